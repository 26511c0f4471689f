"""A judge's engine of its own, inside a scoring actor: vLLM with the policy, the initial policy, or another model."""

from dataclasses import dataclass, field
from typing import Any

from evolve_ray.errors import ResourceError, UserError, first_line
from evolve_ray.models.chat import Chat
from evolve_ray.pools.session import THREADS_ENV
from evolve_ray.refine.rendering import Rendering
from evolve_ray.store.turns import user

# The engine core runs inside the process of the actor, as that of the engines does.
ENV = THREADS_ENV | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class JudgeSpec:
    """The engine of a judge, picklable. `name` is the judge in the recipe; `args` are arguments for vLLM's `LLM`."""

    name: str
    folder: str
    dtype: str
    context_tokens: int
    max_num_seqs: int
    args: dict[str, Any]
    rendering: Rendering = field(default_factory=Rendering)


@dataclass(frozen=True)
class Reply:
    """A judge's reply; `refused` if the model or its server declined to answer."""

    text: str
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    refused: bool = False


class JudgeEngine:
    """Answers questions with one vLLM engine in this process."""

    def __init__(self, spec: JudgeSpec):
        from vllm import LLM

        self.spec = spec
        try:
            self.llm = LLM(
                model=spec.folder,
                dtype=spec.dtype,
                max_model_len=spec.context_tokens,
                max_num_seqs=spec.max_num_seqs,
                **spec.args,
            )
        except TypeError as error:
            raise UserError(f"scorer.args.engine: vLLM does not accept them: {first_line(error)}") from None
        self.chat = Chat(spec.folder, "scorer.args.model", spec.rendering)

    def reload(self, spec: JudgeSpec) -> None:
        """Loads the weights of another model of the same shape in place."""
        from vllm.platforms import current_platform

        from evolve_ray.models.vllm_weights import repack_tied_head

        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": spec.folder})
        if current_platform.is_cpu():
            self.llm.apply_model(repack_tied_head)
        if not self.llm.reset_prefix_cache():
            raise ResourceError("scorer 'judge': vLLM did not reset its prefix cache; submit the same command again")
        self.spec, self.chat = spec, Chat(spec.folder, "scorer.args.model", spec.rendering)

    def replies(self, questions: list[tuple[str, int]], temperature: float, max_tokens: int) -> list[Reply]:
        """The replies to (question, seed), in their order; a question that does not fit the context is refused."""
        from vllm import SamplingParams

        ids = [self.chat.context_ids((user(text),)) for text, _ in questions]
        fits = [place for place, tokens in enumerate(ids) if len(tokens) + max_tokens <= self.spec.context_tokens]
        params = [
            SamplingParams(
                temperature=temperature, max_tokens=max_tokens, seed=questions[place][1], stop_token_ids=self.chat.stop_ids
            )
            for place in fits
        ]
        prompts = [{"prompt_token_ids": ids[place]} for place in fits]
        outputs = self.llm.generate(prompts, params, use_tqdm=False) if fits else []
        replies = [Reply("", refused=True)] * len(questions)
        for place, output in zip(fits, outputs, strict=True):
            result = output.outputs[0]
            text = self.chat.parts(list(result.token_ids), result.text).answer or ""
            replies[place] = Reply(text, len(result.token_ids), len(ids[place]))
        return replies
