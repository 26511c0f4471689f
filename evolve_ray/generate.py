"""Generation: actors with a vLLM engine each, driving refinement strategies without a barrier between rounds."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from evolve_ray import config as options
from evolve_ray import rows
from evolve_ray.chat import Chat, first_line
from evolve_ray.errors import ResourceError, UserError
from evolve_ray.refine import STRATEGIES, Ask, Draft, Strategy, Template, find_plug
from evolve_ray.shards import PoolOptions, ShardWorker

# The engine runs inside the actor's own process and is stepped by it: that is what makes the schedule reproducible.
ENGINE_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
VERSION = 1


@dataclass(frozen=True)
class Completion:
    """What an engine gives back for one request."""

    request_id: str
    text: str
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    finish_reason: str  # "stop" or "length"


class Engine(Protocol):
    """The few verbs that generation needs; tests put a list-driven fake behind them."""

    def use(self, spec: "GenerateSpec", chat: Chat) -> None: ...

    def reload(self, spec: "GenerateSpec", chat: Chat) -> None: ...

    def submit(self, request_id: str, prompt_ids: list[int], seed: int) -> None: ...

    def step(self) -> list[Completion]: ...


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


class VllmEngine:
    """One vLLM engine in this process, stepped by hand."""

    def __init__(self, spec: GenerateSpec, chat: Chat):
        from vllm import LLM

        try:
            self.llm = LLM(
                model=spec.model,
                dtype=spec.dtype,
                max_model_len=spec.context_tokens,
                max_num_seqs=spec.engine.max_num_seqs,
                disable_log_stats=True,
                **spec.engine.args,
            )
        except TypeError as error:
            raise UserError(f"engine.args: vLLM does not take them: {first_line(error)}") from None
        self.use(spec, chat)

    def use(self, spec: GenerateSpec, chat: Chat) -> None:
        from vllm import SamplingParams

        self.sampling = lambda seed: SamplingParams(
            temperature=spec.sampling.temperature,
            top_p=spec.sampling.top_p,
            max_tokens=spec.sampling.max_tokens,
            stop_token_ids=chat.stop_ids,
            seed=seed,
        )

    def reload(self, spec: GenerateSpec, chat: Chat) -> None:
        """New weights of the same shape in place; what the prefix cache holds was computed with the old ones."""
        from vllm.platforms import current_platform

        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": spec.model})
        if current_platform.is_cpu():
            self.llm.apply_model(repack_tied_head)
        if not self.llm.reset_prefix_cache():
            raise ResourceError("engine: the prefix cache was not reset after new weights; submit the same command again")
        self.use(spec, chat)

    def submit(self, request_id: str, prompt_ids: list[int], seed: int) -> None:
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt_ids}, self.sampling(seed))

    def step(self) -> list[Completion]:
        done = []
        for output in self.llm.llm_engine.step():
            if output.finished:
                result = output.outputs[0]
                done.append(
                    Completion(
                        request_id=output.request_id,
                        text=result.text,
                        num_tokens=len(result.token_ids),
                        num_prompt_tokens=len(output.prompt_token_ids),
                        num_cached_tokens=output.num_cached_tokens or 0,
                        finish_reason=result.finish_reason,
                    )
                )
        return done


def repack_tied_head(model: Any) -> None:
    """On CPU, vLLM computes logits from a packed copy of the output layer. If that layer is tied to the embedding, the
    checkpoint has no weight of its own for it, so a reload leaves the packed copy of the old model in place."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and getattr(layer, "weight", None) is not None and layer.weight.numel():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


ENGINES: dict[str, Callable[[GenerateSpec, Chat], Engine]] = {"vllm": VllmEngine}


@dataclass
class Chain:
    """One prompt's strategy in flight: the drafts it waits for, in the order of its asks."""

    prompt: dict
    strategy: Strategy
    waiting: int = 0
    many: bool = False
    answers: list[Draft | None] | None = None
    drafts: list[dict] | None = None
    problem: str = ""


def drive(
    engine: Engine, encode: Callable[[Ask], list[int]], prompts: list[dict], start: Callable[[str], Strategy], spec: Any
) -> tuple:
    """Runs one strategy per prompt on one engine: every finished response goes to its strategy at once.

    `encode` turns an ask into token ids. Returns (generation rows in canonical order, rejected prompts, stats).
    """
    chains = [Chain(prompt, start(prompt["prompt"]), drafts=[]) for prompt in prompts]
    live: dict[str, tuple[Chain, Ask, int, int]] = {}
    stats = {"num_asks": 0, "num_steps": 0, "num_prompt_tokens": 0, "num_cached_tokens": 0, "num_tokens": 0}

    def advance(chain: Chain, value: Any) -> None:
        try:
            asks = chain.strategy.send(value)
        except StopIteration:
            return
        chain.many = isinstance(asks, list)
        batch = asks if isinstance(asks, list) else [asks]
        encoded = [encode(ask) for ask in batch]
        for ask, ids in zip(batch, encoded, strict=True):
            if len(ids) + spec.sampling.max_tokens > spec.context_tokens:
                chain.problem = (
                    f"ask of round {ask.round} has {len(ids)} tokens; with sampling.max_tokens "
                    f"{spec.sampling.max_tokens} that is beyond model.context_tokens {spec.context_tokens}"
                )
                chain.strategy.close()
                return
        chain.waiting, chain.answers = len(batch), [None] * len(batch)
        for position, (ask, ids) in enumerate(zip(batch, encoded, strict=True)):
            prompt_id = chain.prompt["prompt_id"]
            seed = rows.derive_seed(spec.seed, spec.scope, prompt_id, ask.sample, ask.round)
            request_id = f"{prompt_id}/{ask.sample}/{ask.round}/{position}"
            live[request_id] = (chain, ask, position, seed)
            engine.submit(request_id, ids, seed)

    for chain in chains:
        advance(chain, None)
    while live:
        stats["num_steps"] += 1
        for completion in engine.step():
            chain, ask, position, seed = live.pop(completion.request_id)
            row = draft_row(completion, chain.prompt, ask, seed, spec.model_hash)
            for name in ("num_prompt_tokens", "num_cached_tokens", "num_tokens"):
                stats[name] += getattr(completion, name)
            stats["num_asks"] += 1
            assert chain.drafts is not None
            assert chain.answers is not None
            chain.drafts.append(row)
            chain.answers[position] = Draft(
                row["draft_id"], row["text"], ask.sample, ask.round, ask.parent_id, row["finish_reason"]
            )
            chain.waiting -= 1
            if chain.waiting == 0:
                advance(chain, list(chain.answers) if chain.many else chain.answers[0])
    done = [chain for chain in chains if not chain.problem]
    generated = [row for chain in done for row in sorted(chain.drafts or [], key=lambda row: (row["sample"], row["round"]))]
    rejected = [rows.reject(chain.prompt, "generations", chain.problem) for chain in chains if chain.problem]
    return generated, rejected, stats


def draft_row(completion: Completion, prompt: dict, ask: Ask, seed: int, model_hash: str) -> dict:
    return {
        "draft_id": rows.content_id("draft", model_hash, prompt["prompt_id"], ask.sample, ask.round, completion.text),
        "prompt_id": prompt["prompt_id"],
        "split": prompt["split"],
        "sample": ask.sample,
        "round": ask.round,
        "parent_id": ask.parent_id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_tokens": completion.num_tokens,
        "seed": seed,
        "model": model_hash,
    }


class Generator(ShardWorker):
    """Owns one engine and writes one shard of drafts per call."""

    schema = rows.GENERATION

    def __init__(self, spec: GenerateSpec):
        super().__init__(spec)
        started = time.monotonic()
        self.chat = Chat(spec.model)
        self.engine = find_plug(ENGINES, spec.engine.name, "engine.name")(spec, self.chat)
        self.start_seconds = time.monotonic() - started

    def renew(self, spec: GenerateSpec) -> None:
        started = time.monotonic()
        self.chat = Chat(spec.model)
        if spec.model_hash != self.spec.model_hash:
            self.engine.reload(spec, self.chat)
        else:
            self.engine.use(spec, self.chat)
        self.spec = spec
        self.start_seconds += time.monotonic() - started

    def process(self, shard: int, prompts: list[dict]) -> tuple[list[dict], list[dict], dict]:
        started = time.monotonic()
        spec = self.spec

        strategy = find_plug(STRATEGIES, spec.strategy.name, "strategy.name")

        def start(prompt: str) -> Strategy:
            return strategy(prompt, spec.template, spec.strategy)

        try:
            generated, rejected, stats = drive(self.engine, lambda ask: self.chat.context_ids(ask.messages), prompts, start, spec)
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                os._exit(1)  # a dead engine never serves again: end the actor, so that Ray restarts it and retries the shard
            raise
        stats |= {"num_in": len(prompts), "engine_seconds": round(time.monotonic() - started, 3)}
        stats |= {
            "start_seconds": round(self.start_seconds, 3),
            "num_cut": sum(r["finish_reason"] == "length" for r in generated),
        }
        self.start_seconds = 0.0
        return generated, rejected, stats


def pool(engine: options.Engine) -> PoolOptions:
    """The pool of engines that the recipe asks for."""
    return PoolOptions(
        name="engines",
        worker=Generator,
        actors=engine.actors,
        cpus=engine.cpus_per_actor,
        gpus=engine.gpus_per_actor,
        restarts=engine.max_restarts,
        env=ENGINE_ENV | {name: str(value) for name, value in engine.env.items()},
    )
