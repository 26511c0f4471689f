"""What an engine is asked and what it gives back: the seam between strategies and vLLM."""

from dataclasses import dataclass
from typing import Protocol

from evolve_ray.config import options
from evolve_ray.generate.scorer_requests import RemoteJudge
from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import Template


@dataclass(frozen=True)
class Completion:
    """What an engine gives back for one request."""

    request_id: str
    text: str
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    finish_reason: str  # "stop" or "length"
    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()  # log-probability of each token under the model itself, nats; only where asked for


class Engine(Protocol):
    """The few verbs that generation needs; tests put a list-driven fake behind them."""

    def use(self, spec: "GenerateSpec", chat: Chat) -> None: ...

    def reload(self, spec: "GenerateSpec", chat: Chat) -> None: ...

    def submit(self, request_id: str, prompt_ids: list[int], seed: int, *, logps: bool = False) -> None: ...

    def step(self) -> list[Completion]: ...

    def counts(self) -> dict[str, int]: ...  # what else it counted since the last call


@dataclass(frozen=True)
class GenerateSpec:
    """Everything an actor needs, picklable."""

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
    judge: "RemoteJudge | None" = None  # the scorer, for strategies that ask it
    verifier: options.Verifier | None = None  # likewise
