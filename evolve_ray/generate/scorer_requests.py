"""Scores for strategies that ask the scorer while they generate."""

from dataclasses import dataclass
from typing import Any, Protocol


class Judging(Protocol):
    """Scores for strategies that ask in between: `ask` starts, `finished` gives back what is done."""

    def ask(self, key: int, prompt: dict, texts: list[str]) -> None: ...

    def finished(self, *, wait: bool) -> list[tuple[int, list[float]]]: ...


@dataclass(frozen=True)
class RemoteJudge:
    """The recipe's scoring actors, and what they need to know to score."""

    actors: tuple[Any, ...]
    spec: Any

    def open(self) -> "OpenRequests":
        return OpenRequests(self)


class OpenRequests:
    """Requests to the scoring actors that are under way: what one engine step brings forth goes out as one call."""

    def __init__(self, judge: RemoteJudge):
        self.judge = judge
        self.asked: list[tuple[int, dict, list[str]]] = []
        self.calls: dict[Any, list[tuple[int, dict, list[str]]]] = {}
        self.sent = 0

    def ask(self, key: int, prompt: dict, texts: list[str]) -> None:
        self.asked.append((key, prompt, texts))

    def finished(self, *, wait: bool) -> list[tuple[int, list[float]]]:
        import ray

        if self.asked:
            rows_of = [(prompt, text) for _, prompt, texts in self.asked for text in texts]
            batch = ([p["prompt"] for p, _ in rows_of], [p["answer"] for p, _ in rows_of], [text for _, text in rows_of])
            actor = self.judge.actors[self.sent % len(self.judge.actors)]
            self.calls[actor.call.remote(self.judge.spec, "score_texts", *batch)] = self.asked
            self.asked, self.sent = [], self.sent + 1
        ready, _ = ray.wait(list(self.calls), num_returns=1, timeout=None if wait else 0) if self.calls else ([], [])
        done = []
        for call in ready:
            scores = iter(ray.get(call))
            done += [(key, [next(scores) for _ in texts]) for key, _, texts in self.calls.pop(call)]
        return done
