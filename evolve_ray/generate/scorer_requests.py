"""Requests for scores from strategies that ask the scorer while they generate."""

from dataclasses import dataclass
from typing import Any, Protocol


class ScorerRequests(Protocol):
    """What generation needs from a scorer."""

    def ask(self, key: int, prompt: dict, texts: list[str]) -> None:
        """Requests the scores of some responses to one prompt; does not wait for them."""

    def finished(self, *, wait: bool) -> list[tuple[int, list[float]]]:
        """(key, scores) of all requests that finished since the last call; with `wait` it blocks until at least one has."""
        ...


@dataclass(frozen=True)
class RemoteScorer:
    """The recipe's scoring actors, and the spec with which they score."""

    actors: tuple[Any, ...]
    spec: Any

    def open(self) -> "OpenRequests":
        return OpenRequests(self)


class OpenRequests:
    """Open requests to the scoring actors. All requests after one engine step go out as one call, to the next actor in turn."""

    def __init__(self, scorer: RemoteScorer):
        self.scorer = scorer
        self.unsent: list[tuple[int, dict, list[str]]] = []
        self.calls: dict[Any, list[tuple[int, dict, list[str]]]] = {}
        self.num_calls = 0

    def ask(self, key: int, prompt: dict, texts: list[str]) -> None:
        self.unsent.append((key, prompt, texts))

    def finished(self, *, wait: bool) -> list[tuple[int, list[float]]]:
        import ray

        if self.unsent:
            pairs = [(prompt, text) for _, prompt, texts in self.unsent for text in texts]
            batch = ([p["prompt"] for p, _ in pairs], [p["answer"] for p, _ in pairs], [text for _, text in pairs])
            actor = self.scorer.actors[self.num_calls % len(self.scorer.actors)]
            self.calls[actor.call.remote(self.scorer.spec, "score_texts", *batch)] = self.unsent
            self.unsent, self.num_calls = [], self.num_calls + 1
        ready, _ = ray.wait(list(self.calls), num_returns=1, timeout=None if wait else 0) if self.calls else ([], [])
        done = []
        for call in ready:
            scores = iter(ray.get(call))
            done += [(key, [next(scores) for _ in texts]) for key, _, texts in self.calls.pop(call)]
        return done
