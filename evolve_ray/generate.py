"""Generation: actors with a vLLM engine each, that write drafts and take new weights in place."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from evolve_ray.config import options
from evolve_ray.config.plugs import find_plug
from evolve_ray.drive import Completion, Drive, Engine, GenerateSpec
from evolve_ray.errors import ResourceError, UserError, first_line
from evolve_ray.models.chat import Chat
from evolve_ray.pools.actors import PoolOptions
from evolve_ray.pools.worker import ShardWorker
from evolve_ray.refine.asks import Ask, Strategy
from evolve_ray.refine.strategies import KNOWN
from evolve_ray.scorers import build_verifier, checked
from evolve_ray.store import rows

# The engine runs inside the actor's own process and is stepped by it: that is what makes the schedule reproducible.
ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",  # a prompt at a time, between two steps: other threads would only be woken
}
GUESSED = {
    "num_guessed_tokens": "vllm:spec_decode_num_draft_tokens",
    "num_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
}
VERSION = 2


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
                disable_log_stats="speculative_config" not in spec.engine.args,  # where `counts` reads
                **spec.engine.args,
            )
        except TypeError as error:
            raise UserError(f"engine.args: vLLM does not take them: {first_line(error)}") from None
        end_with_core(getattr(self.llm.llm_engine.engine_core, "resources", None))
        self.counted = dict.fromkeys(GUESSED, 0)
        self.use(spec, chat)

    def use(self, spec: GenerateSpec, chat: Chat) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.sampling = lambda seed, logps: SamplingParams(
            output_kind=RequestOutputKind.FINAL_ONLY,  # else a step makes the text so far of every request
            temperature=spec.sampling.temperature,
            top_p=spec.sampling.top_p,
            max_tokens=spec.sampling.max_tokens,
            stop_token_ids=chat.stop_ids,
            seed=seed,
            logprobs=0 if logps else None,
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

    def submit(self, request_id: str, prompt_ids: list[int], seed: int, *, logps: bool = False) -> None:
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt_ids}, self.sampling(seed, logps))

    def step(self) -> list[Completion]:
        done = []
        for output in self.llm.llm_engine.step():
            if output.finished:
                result = output.outputs[0]
                logps = [found[token].logprob for token, found in zip(result.token_ids, result.logprobs or (), strict=False)]
                done.append(
                    Completion(
                        request_id=output.request_id,
                        text=result.text,
                        num_tokens=len(result.token_ids),
                        num_prompt_tokens=len(output.prompt_token_ids),
                        num_cached_tokens=output.num_cached_tokens or 0,
                        finish_reason=result.finish_reason,
                        token_ids=tuple(result.token_ids),
                        logps=tuple(logps),
                    )
                )
        return done

    def counts(self) -> dict[str, int]:
        """Tokens that speculation guessed and those of them that the model accepted, since the last call; {} without it."""
        if not self.llm.llm_engine.log_stats:
            return {}
        found = {metric.name: int(metric.value) for metric in self.llm.get_metrics() if metric.name in GUESSED.values()}
        now = {name: found.get(metric, 0) for name, metric in GUESSED.items()}
        before, self.counted = self.counted, now
        return {name: now[name] - before[name] for name in GUESSED}


def end_with_core(resources: Any) -> None:
    """Ends this process when vLLM notices that its second one, where `engine.env` asks for it, is dead.

    Its client would wait for ever for the answer to a step that was under way. `resources` is None without a second process.
    """

    def watch() -> None:
        while not resources.engine_dead:
            time.sleep(0.5)
        os._exit(1)

    if resources is not None:
        threading.Thread(target=watch, daemon=True).start()


def repack_tied_head(model: Any) -> None:
    """On CPU, vLLM computes logits from a packed copy of the output layer. If that layer is tied to the embedding, the
    checkpoint has no weight of its own for it, so a reload leaves the packed copy of the old model in place."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and getattr(layer, "weight", None) is not None and layer.weight.numel():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


ENGINES: dict[str, Callable[[GenerateSpec, Chat], Engine]] = {"vllm": VllmEngine}


class Generator(ShardWorker):
    """Owns one engine and writes one shard of drafts per call."""

    schema = rows.GENERATION
    stage = "generations"

    def __init__(self, spec: GenerateSpec):
        super().__init__(spec)
        started = time.monotonic()
        self.chat = Chat(spec.model)
        self.engine = find_plug(ENGINES, spec.engine.name, "engine.name")(spec, self.chat)
        self.verifier = build_verifier(spec.verifier) if spec.verifier else None
        self.start_seconds = time.monotonic() - started

    def renew(self, spec: GenerateSpec) -> None:
        started = time.monotonic()
        self.chat = Chat(spec.model)
        if spec.model_hash != self.spec.model_hash:
            self.engine.reload(spec, self.chat)
        else:
            self.engine.use(spec, self.chat)
        if spec.verifier != self.spec.verifier:
            self.verifier = build_verifier(spec.verifier) if spec.verifier else None
        self.spec = spec
        self.start_seconds += time.monotonic() - started

    def process(self, shard: int, prompts: list[dict]) -> tuple[list[dict], list[dict], dict]:
        started = time.monotonic()
        spec = self.spec
        strategy = find_plug(KNOWN, spec.strategy.name, "strategy.name")

        def start(prompt: str) -> Strategy:
            return strategy(prompt, spec.template, spec.strategy)

        drive = Drive(self.engine, self.encode, spec, spec.judge.open() if spec.judge else None)
        drive.beat = self.beat
        drive.verify = self.verify if spec.verifier else None
        with dead_engine_ends_actor():
            generated, rejected, stats = drive.run(prompts, start)
        stats |= {"num_in": len(prompts), "engine_seconds": round(time.monotonic() - started, 3)}
        stats |= self.engine.counts()
        stats |= {
            "start_seconds": round(self.start_seconds, 3),
            "num_cut": sum(r["finish_reason"] == "length" for r in generated),
        }
        self.start_seconds = 0.0
        return generated, rejected, stats

    def verify(self, prompt: dict, text: str) -> float:
        assert self.verifier is not None
        return checked("verifier", self.verifier, [prompt["prompt"]], [prompt["answer"]], [text])[0]

    def encode(self, ask: Ask) -> list[int]:
        return self.chat.context_ids(ask.messages)

    def probe(self, prompts: list[dict]) -> list[dict]:
        """A chain of two rounds on each prompt, token by token: `{context, response, logps}`, the engine's own nats.

        Round 2 continues a draft that the prefix cache holds, so weights or cached states of an older model would show.
        """
        spec, found = self.spec, []
        asked: dict[str, tuple[list[int], str]] = {}
        for round_number in (1, 2):
            for prompt in prompts:
                messages = spec.template.direct(prompt["prompt"])
                if round_number == 2:
                    messages = spec.template.refinement(prompt["prompt"], asked[f"{prompt['prompt_id']}/1"][1])
                request_id = f"{prompt['prompt_id']}/{round_number}"
                asked[request_id] = (self.chat.context_ids(messages), "")
                seed = rows.derive_seed("probe", spec.seed, prompt["prompt_id"], round_number)
                self.engine.submit(request_id, asked[request_id][0], seed, logps=True)
            waiting = len(prompts)
            with dead_engine_ends_actor():
                while waiting:
                    for done in self.engine.step():
                        context = asked[done.request_id][0]
                        asked[done.request_id] = (context, done.text)
                        found.append({"id": done.request_id, "context": context, "response": done.token_ids, "logps": done.logps})
                        waiting -= 1
        return sorted(found, key=lambda row: row["id"])


@contextlib.contextmanager
def dead_engine_ends_actor() -> Iterator[None]:
    """A dead engine never serves again: end the actor, so that Ray restarts it and retries the shard."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "EngineDeadError":
            os._exit(1)
        raise


def pool(engine: options.Engine) -> PoolOptions:
    """The pool of engines that the recipe asks for."""
    return PoolOptions(
        name="engines",
        worker=Generator,
        actors=engine.actors,
        cpus=engine.cpus_per_actor,
        gpus=engine.gpus_per_actor,
        restarts=engine.max_restarts,
        stall_s=engine.stall_s,
        env=ENGINE_ENV | {name: str(value) for name, value in engine.env.items()},
    )
