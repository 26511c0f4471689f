"""The engine on vLLM."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from evolve_ray.errors import ResourceError, UserError, first_line
from evolve_ray.generate.spec import Completion, GenerateSpec
from evolve_ray.models.chat import Chat
from evolve_ray.models.vllm_weights import repack_tied_head
from evolve_ray.pools.session import THREADS_ENV

# The engine core runs inside the process of the actor, which calls each step: so the schedule is reproducible.
ENGINE_ENV = THREADS_ENV | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",  # the actor encodes one prompt at a time, so threads would not help
}
SPECULATION_METRICS = {  # our counts of speculative decoding, and vLLM's metrics for them
    "num_guessed_tokens": "vllm:spec_decode_num_draft_tokens",
    "num_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
}


class VllmEngine:
    """One vLLM engine in this process; the caller calls each step."""

    def __init__(self, spec: GenerateSpec, chat: Chat):
        from vllm import LLM

        try:
            self.llm = LLM(
                model=spec.model,
                dtype=spec.dtype,
                max_model_len=spec.context_tokens,
                max_num_seqs=spec.engine.max_num_seqs,
                disable_log_stats="speculative_config" not in spec.engine.args,  # `counts` reads these statistics
                **spec.engine.args,
            )
        except TypeError as error:
            raise UserError(f"engine.args: vLLM does not accept them: {first_line(error)}") from None
        exit_with_engine_processes(self.llm.llm_engine.engine_core)
        self.last_counts = dict.fromkeys(SPECULATION_METRICS, 0)
        self.use(spec, chat)

    def use(self, spec: GenerateSpec, chat: Chat) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.sampling: Callable[..., Any] = lambda seed, logps, own=None: SamplingParams(
            output_kind=RequestOutputKind.FINAL_ONLY,  # otherwise each step detokenises the partial text of every request
            top_p=spec.sampling.top_p,
            stop_token_ids=chat.stop_ids,
            seed=seed,
            logprobs=0 if logps else None,
            **{"temperature": spec.sampling.temperature, "max_tokens": spec.sampling.max_tokens, **(own or {})},
        )

    def reload(self, spec: GenerateSpec, chat: Chat) -> None:
        """Loads new weights of the same shape in place, and empties the prefix cache, which holds states of the old weights."""
        from vllm.platforms import current_platform

        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": spec.model})
        if current_platform.is_cpu():
            self.llm.apply_model(repack_tied_head)
        if not self.llm.reset_prefix_cache():
            raise ResourceError("engine: vLLM did not reset its prefix cache after new weights; submit the same command again")
        self.use(spec, chat)

    def submit(
        self, request_id: str, prompt_ids: list[int], seed: int, *, logps: bool = False, sampling: Mapping[str, Any] | None = None
    ) -> None:  # fmt: skip
        params = self.sampling(seed, logps, **({"own": sampling} if sampling else {}))
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt_ids}, params)

    def step(self) -> list[Completion]:
        done = []
        for output in self.llm.llm_engine.step():
            if output.finished:
                result = output.outputs[0]
                logprobs = zip(result.token_ids, result.logprobs or (), strict=False)
                logps = [by_token[token].logprob for token, by_token in logprobs]
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
                        prompt_logps=prompt_logps(output),
                        stopped_at=result.stop_reason if isinstance(result.stop_reason, str) else "",
                    )
                )
        return done

    def counts(self) -> dict[str, int]:
        """Tokens that speculative decoding guessed and that the model accepted since the last call; {} without it."""
        if not self.llm.llm_engine.log_stats:
            return {}
        wanted = SPECULATION_METRICS.values()
        values = {metric.name: int(metric.value) for metric in self.llm.get_metrics() if metric.name in wanted}
        counts = {name: values.get(metric, 0) for name, metric in SPECULATION_METRICS.items()}
        last_counts, self.last_counts = self.last_counts, counts
        return {name: counts[name] - last_counts[name] for name in SPECULATION_METRICS}


def prompt_logps(output: Any) -> tuple[float, ...]:
    """The log-probabilities of a prompt's tokens but the first, in nats; () if they were not asked for."""
    by_place = (output.prompt_logprobs or ())[1:]
    return tuple(part[token].logprob for token, part in zip(output.prompt_token_ids[1:], by_place, strict=False))


def exit_with_engine_processes(engine_core: Any) -> None:
    """Ends this process when vLLM notices that a process of its engine is dead; `engine_core` is vLLM's client of its core.

    There are two kinds: the process of the engine core, if `engine.env` asks for it, for whose answer the client would wait for
    ever; and the processes that hold a part of the model each (`tensor_parallel_size`), without which each step only raises an
    error.
    """
    resources = getattr(engine_core, "resources", None)
    executor = getattr(getattr(engine_core, "engine_core", None), "model_executor", None)

    def watch() -> None:
        while not getattr(resources, "engine_dead", False) and not getattr(executor, "is_failed", False):
            time.sleep(0.5)
        os._exit(1)

    if resources is not None or hasattr(executor, "is_failed"):
        threading.Thread(target=watch, daemon=True).start()
