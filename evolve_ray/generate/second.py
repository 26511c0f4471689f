"""Asks of a strategy to a second model, whose engines are actors of their own."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from evolve_ray.generate.spec import Completion
from evolve_ray.refine.asks import Ask


@dataclass(frozen=True)
class Answer:
    """What a second model answered: the completion, and what its row says beside it; or only why there is none."""

    completion: Completion | None
    details: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


class SecondModel(Protocol):
    """What generation needs from a second model."""

    seconds: float  # that its engines worked

    @property
    def model_hash(self) -> str: ...

    def ask(self, request_id: str, ask: Ask, seed: int) -> None:
        """Requests one response; does not wait for it."""

    def finished(self, *, wait: bool) -> list[tuple[str, Answer]]:
        """(request id, answer) of all that finished since the last call; with `wait` it blocks until at least one has."""
        ...


@dataclass(frozen=True)
class RemoteModel:
    """The engines of a second model, and the spec with which they answer."""

    actors: tuple[Any, ...]
    spec: Any

    def open(self) -> "OpenAsks":
        return OpenAsks(self)


class OpenAsks:
    """Open asks to a second model. An engine that this actor does not use already gets what waits, shared with the other ones."""

    def __init__(self, model: RemoteModel):
        self.model, self.seconds = model, 0.0
        self.unsent: list[tuple[str, Ask, int]] = []
        self.calls: dict[Any, int] = {}  # the engine's number by its call

    @property
    def model_hash(self) -> str:
        return self.model.spec.model_hash

    def ask(self, request_id: str, ask: Ask, seed: int) -> None:
        self.unsent.append((request_id, ask, seed))

    def finished(self, *, wait: bool) -> list[tuple[str, Answer]]:
        import ray

        free = [number for number in range(len(self.model.actors)) if number not in self.calls.values()]
        for place, number in enumerate(free):
            share = -(-len(self.unsent) // (len(free) - place))
            batch, self.unsent = self.unsent[:share], self.unsent[share:]
            if batch:
                self.calls[self.model.actors[number].call.remote(self.model.spec, "answer", batch)] = number
        ready, _ = ray.wait(list(self.calls), num_returns=1, timeout=None if wait else 0) if self.calls else ([], [])
        done = []
        for call in ready:
            del self.calls[call]
            answers, seconds = ray.get(call)
            self.seconds += seconds
            done += answers
        return done
