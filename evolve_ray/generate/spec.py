"""The interface between generation and an inference engine: requests, completions, and the spec of an actor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from evolve_ray.config import options
from evolve_ray.generate.scorer_requests import RemoteScorer
from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import Template


@dataclass(frozen=True)
class Completion:
    """The finished response to one request."""

    request_id: str
    text: str
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    finish_reason: str  # "stop" or "length"
    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()  # log-probability of each token under the model, in nats; only if the request asked for it
    prompt_logps: tuple[float, ...] = ()  # of each token of the prompt but the first; only if the request asked for it
    stopped_at: str = ""  # the stop string of the request at which it ended


class Engine(Protocol):
    """The few methods that generation needs from an engine; tests use a fake that answers from a list."""

    def use(self, spec: "GenerateSpec", chat: Chat) -> None:
        """Takes the sampling parameters of another spec with the same weights."""

    def reload(self, spec: "GenerateSpec", chat: Chat) -> None:
        """Loads the weights of another model of the same shape, and takes its spec."""

    def submit(
        self, request_id: str, prompt_ids: list[int], seed: int, *, logps: bool = False, sampling: Mapping[str, Any] | None = None
    ) -> None:  # fmt: skip
        """Adds one request. `sampling` is what its ask sets in place of the spec's; it is passed only if that is something."""

    def step(self) -> list[Completion]:
        """Computes one step of all requests; returns those that finished."""
        ...

    def counts(self) -> dict[str, int]:
        """Further counts of the engine since the last call."""
        ...


@dataclass(frozen=True)
class GenerateSpec:
    """Everything that a generating actor needs, picklable."""

    prompts: str
    work: str
    key: str
    shard_prompts: int
    model: str
    model_hash: str
    dtype: str
    context_tokens: int
    template: Template
    strategy: options.Strategy
    sampling: options.Sampling
    engine: options.Engine
    seed: int
    scope: int | str  # the iteration, or "evaluation"
    remote_scorer: RemoteScorer | None = None  # only for strategies that ask for scores
    verifier: options.Verifier | None = None  # only for strategies that ask the verifier
    models: Mapping[str, Any] = field(default_factory=dict)  # `second.RemoteModel` by name, for strategies that ask them
    table: str = "model"  # of the recipe, which names the model
