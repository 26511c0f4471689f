"""A replica whose engine has no model: its tokens follow from seed and prompt, and words in the prompt say how it behaves.

Everything around the engine is real: Serve's proxy and controller, vLLM's request and response classes, the tokenizer.
"""

import asyncio
import hashlib
import os
import random
from typing import Any

from evolve_ray.serve.engine import counted, engine_config
from evolve_ray.serve.replica import Replica
from evolve_ray.serve.settings import Settings
from tests.plain.runs import HOSTILE

LENGTH = 8  # tokens of an answer
SLOW_S, SLOW_LENGTH = 0.05, 200  # between the tokens of an answer to a prompt with "slow", and their number


class FakeLLM:
    """What vLLM's chat endpoint and the replica need from an engine."""

    def __init__(self, vllm_config: Any):
        from vllm.renderers import renderer_from_config
        from vllm.v1.engine.input_processor import InputProcessor

        self.vllm_config, self.model_config = vllm_config, vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.errored = False

    def check_admission(self, *arguments: Any, **named: Any) -> None:
        pass

    async def check_health(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    async def generate(self, inputs: Any, params: Any, request_id: str, **named: Any) -> Any:
        from vllm.outputs import CompletionOutput, RequestOutput
        from vllm.sampling_params import RequestOutputKind

        self.input_processor.process_inputs(request_id, inputs, params, supported_tasks=("generate",))  # vLLM's own checks
        ids = inputs["prompt_token_ids"]
        text = self.renderer.tokenizer.decode(ids)
        pieces = pieces_of(text, random.random() if params.seed is None else params.seed)
        length = min(params.max_tokens, len(pieces))
        in_pieces = params.output_kind == RequestOutputKind.DELTA
        for place in range(length):
            await asyncio.sleep(SLOW_S if "slow" in text else 0)
            if "die" in text and place == 2:
                os._exit(1)
            ended = place + 1 == length
            if not in_pieces and not ended:
                continue
            written = pieces[place] if in_pieces else "".join(pieces[:length])
            reason = ("length" if length < len(pieces) else "stop") if ended else None
            token_ids = self.renderer.tokenizer.encode(written, add_special_tokens=False)
            outputs = [CompletionOutput(index, written, token_ids, None, None, finish_reason=reason) for index in range(params.n)]
            yield RequestOutput(request_id, None, ids, None, outputs, ended, num_cached_tokens=0)


def pieces_of(prompt: str, seed: float) -> list[str]:
    """The tokens of an answer: letters, words of a sentence, or what a page must never obey."""
    letters = hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest() * 4
    if "hostile" in prompt:
        return [HOSTILE[int(letters[0], 16) % len(HOSTILE)]]
    if "words" in prompt:
        return ["the ", "quick ", f"{letters[:5]} ", "fox ", "jumps"]
    return list(letters[: SLOW_LENGTH if "slow" in prompt else LENGTH])


class FakeReplica(Replica):
    def start_engine(self, settings: Settings) -> Any:
        return counted(FakeLLM, self.metrics)(engine_config(settings))
