"""The engine of a replica: vLLM's asynchronous one, with vLLM's own chat endpoint around it.

A direct answer goes through vLLM's code from the request to the last byte of the reply. Only two things differ: messages become
token ids by `Chat`, as in training, and the sampling defaults are those of the recipe.
"""

import asyncio
import collections
import contextlib
import contextvars
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from evolve_ray.errors import UserError, first_line
from evolve_ray.models.chat import Chat
from evolve_ray.refine.asks import Ask, Messages
from evolve_ray.serve.errors import RequestError
from evolve_ray.serve.metrics import ServeMetrics
from evolve_ray.serve.rounds import Piece
from evolve_ray.serve.settings import Settings

ROLES = ("system", "developer", "user", "assistant")  # a role is part of the markup: no other word may stand there
# Fields of vLLM's request that would change how messages are rendered, or what is rendered: this endpoint renders as training.
NOT_RENDERED = (
    "tools", "documents", "chat_template", "chat_template_kwargs", "continue_final_message", "echo", "add_special_tokens",
    "reasoning_effort", "mm_processor_kwargs", "media_io_kwargs", "use_beam_search", "kv_transfer_params", "ec_transfer_params",
    "vllm_xargs", "return_prompt_text",
)  # fmt: skip
ONLY_DIRECT = ("prompt_logprobs", "truncate_prompt_tokens")  # those of a single engine request
LONG_TEXT = 20_000  # characters; the tokens of a longer text are computed in a thread, so that other requests go on
MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"
round_number: contextvars.ContextVar[int] = contextvars.ContextVar("round_number", default=1)


def make_engine(settings: Settings, metrics: ServeMetrics) -> Any:
    """Starts vLLM's asynchronous engine, whose requests are counted. Takes half a minute or more."""
    from vllm.v1.engine import async_llm

    async_llm.RequestOutputCollector = single_outputs(async_llm.RequestOutputCollector)
    return counted(async_llm.AsyncLLM, metrics).from_vllm_config(engine_config(settings))


def counted(kind: Any, metrics: ServeMetrics) -> Any:
    """The class of an engine that counts its requests."""

    class Counted(kind):
        async def generate(self, *arguments: Any, **named: Any) -> AsyncGenerator[Any, None]:
            number, started = round_number.get(), time.monotonic()
            first_s, written, output, aborted = None, 0, None, False
            metrics.round_started()
            outputs = super().generate(*arguments, **named)
            try:
                async for output in outputs:
                    if first_s is None:
                        first_s = time.monotonic() - started
                    written += sum(len(part.token_ids) for part in output.outputs)
                    yield output
            except (asyncio.CancelledError, GeneratorExit):
                aborted = True
                raise
            finally:
                await outputs.aclose()
                tokens = {"generated": written}
                if output is not None:
                    tokens |= {"prompt": len(output.prompt_token_ids or ()), "cached": output.num_cached_tokens or 0}
                metrics.round_ended(number, time.monotonic() - started, first_s, tokens, aborted=aborted)

    return Counted


def engine_config(settings: Settings) -> Any:
    """vLLM's configuration of the engine; raises UserError if vLLM does not know one of its arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    config = settings.config
    try:
        args = AsyncEngineArgs(
            model=settings.folder,
            served_model_name=[settings.name],
            dtype=config.model.dtype,
            max_model_len=config.model.context_tokens,
            max_num_seqs=config.engine.max_num_seqs,
            **config.engine.args,
        )
    except TypeError as error:
        raise UserError(f"engine.args: vLLM does not accept them: {first_line(error)}") from None
    with engine_in_one_process():
        return args.create_engine_config(UsageContext.OPENAI_API_SERVER)


def single_outputs(collector: Any) -> Any:
    """vLLM's queue of the outputs of one request, without merging those of a stream that is read late.

    So the events of a stream do not depend on how busy this machine is: one for each output of the engine.
    """

    class SingleOutputs(collector):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.waiting: collections.deque[Any] = collections.deque()

        def put(self, output: Any) -> None:
            if not self.aggregate or isinstance(output, Exception):
                super().put(output)
            else:
                self.waiting.append(output)
                self.ready.set()

        def get_nowait(self) -> Any:
            if not self.waiting:
                return super().get_nowait()
            output = self.waiting.popleft()
            if not self.waiting and self.output is None:
                self.ready.clear()
            return output

        async def get(self) -> Any:
            while not self.waiting and self.output is None:
                await self.ready.wait()
            return self.get_nowait()

    return SingleOutputs


@contextlib.contextmanager
def engine_in_one_process() -> Iterator[None]:
    """On a CPU, vLLM puts the model into a further process, and the two wait for each other in a loop that keeps cores busy.

    It puts both into one process only if this variable says so while the engine is configured.
    """
    from vllm.platforms import current_platform

    before = os.environ.get(MULTIPROCESSING)
    if current_platform.is_cpu():
        os.environ[MULTIPROCESSING] = "0"
    try:
        yield
    finally:
        os.environ.pop(MULTIPROCESSING, None)
        if before is not None:
            os.environ[MULTIPROCESSING] = before


def make_chat(engine: Any, settings: Settings, chat: Chat) -> Any:
    """vLLM's chat endpoint on this engine, which renders messages as training does."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    class RenderedChat(OpenAIServingChat):
        async def render_chat_request(self, request: Any) -> Any:
            if (error := await self._check_model(request)) is not None:
                return error
            self._preflight(request.n or 1)
            return [], [await self.engine_input(request, plain_messages(request))]

        async def engine_input(self, request: Any, messages: Messages) -> Any:
            """The input of one engine request, after vLLM's own checks of lengths."""
            from vllm.inputs import TokensPrompt, tokens_input

            ids = await context_ids(chat, messages)
            prompt = TokensPrompt(prompt_token_ids=ids)
            request.build_tok_params(self.model_config).apply_post_tokenization(self.renderer.tokenizer, prompt)
            return tokens_input(prompt["prompt_token_ids"], cache_salt=request.cache_salt)

    models = OpenAIServingModels(engine, [BaseModelPath(name=settings.name, model_path=settings.name)])
    serving = RenderedChat(
        engine, models, "assistant", online_renderer=None, request_logger=None, chat_template=None,
        chat_template_content_format="string",
    )  # fmt: skip
    if settings.has_recipe:
        sampling = settings.config.sampling
        serving.default_sampling_params = {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens,
        }  # fmt: skip
        serving.override_max_tokens = None
    serving.system_fingerprint = fingerprint(engine.vllm_config)
    known = {engine.renderer.get_eos_token_id(), *as_ids(serving.model_config.try_get_generation_config().get("eos_token_id"))}
    if more := [token for token in chat.stop_ids if token not in known]:
        serving.default_sampling_params["stop_token_ids"] = more
    return serving


def fingerprint(vllm_config: Any) -> str | None:
    """The `system_fingerprint` of vLLM's own server, whatever processes the engine has here: they change no reply."""
    from vllm.entrypoints.serve.utils.fingerprint import get_system_fingerprint
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    backend = parallel.distributed_executor_backend
    if current_platform.is_cpu() and backend == "uni":
        parallel.distributed_executor_backend = "mp"
    try:
        return get_system_fingerprint(vllm_config)
    finally:
        parallel.distributed_executor_backend = backend


def as_ids(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


async def context_ids(chat: Chat, messages: Messages) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks. A template may refuse it: that is the client's error."""
    from jinja2 import TemplateError

    try:
        if sum(len(message["content"]) for message in messages) > LONG_TEXT:
            return await asyncio.to_thread(chat.context_ids, messages)
        return chat.context_ids(messages)
    except TemplateError as error:
        raise RequestError(f"messages: the chat template of this model refuses them: {first_line(error)}", "messages") from None
    except UnicodeEncodeError:
        raise RequestError("messages: contain a half of a surrogate pair, which is not text; remove it", "messages") from None


def plain_messages(request: Any) -> Messages:
    """The messages of a request as roles and texts. Raises RequestError for anything that the model was not trained on."""
    messages = []
    for place, message in enumerate(request.messages):
        field = f"messages.{place}"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RequestError(f"{field}.role: must be one of {', '.join(ROLES)}", f"{field}.role")
        if message.get("tool_calls") or message.get("function_call"):
            raise RequestError(f"{field}.tool_calls: this endpoint calls no tools; remove them", f"{field}.tool_calls")
        messages.append({"role": role, "content": text_of(content, f"{field}.content")})
    if not messages:
        raise RequestError("messages: is empty; send at least one", "messages")
    return tuple(messages)


def text_of(content: Any, field: str) -> str:
    """The text of a message; parts of type `text` are joined by line ends, as vLLM does."""
    if isinstance(content, str):
        return content
    texts = []
    for part in list(content) if content is not None and not isinstance(content, dict) else [None]:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise RequestError(f"{field}: must be text; this endpoint reads no {kind}", field)
    return "\n".join(texts)


def check_fields(request: Any, *, direct: bool) -> None:
    """Raises RequestError for a field that this endpoint would otherwise have to ignore."""
    unset = type(request).model_fields
    refused = [*NOT_RENDERED, *([] if direct else ONLY_DIRECT)]
    for name in refused:
        value = getattr(request, name)
        if value not in (None, False, [], {}) and value != unset[name].default:
            why = "is not supported by this endpoint" if name in NOT_RENDERED else "is not supported with refinement"
            raise RequestError(f"{name}: {why}; remove it", name)
    if not request.add_generation_prompt:
        raise RequestError("add_generation_prompt: must be true: this endpoint always answers", "add_generation_prompt")
    if request.tool_choice not in (None, "none"):
        raise RequestError("tool_choice: this endpoint calls no tools; remove it", "tool_choice")
    if not direct and (request.n or 1) != 1:
        raise RequestError("n: must be 1 with refinement; use refine.strategy 'parallel' for several samples", "n")


class RoundWriter:
    """The engine as the rounds of one request see it (`rounds.Engine`)."""

    def __init__(self, serving: Any, chat: Chat, request: Any, request_id: str, settings: Settings, *, in_pieces: bool):
        self.serving, self.chat, self.request, self.request_id = serving, chat, request, request_id
        self.in_pieces = in_pieces
        self.num_written: collections.Counter[str] = collections.Counter()  # responses by sample, round and kind
        self.context_tokens: int = settings.config.model.context_tokens
        asked = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        self.max_tokens: int = settings.config.sampling.max_tokens if asked is None else asked

    def answer(self, text: str, token_ids: list[int]) -> str:
        return self.chat.parts(token_ids, text).answer or ""

    async def encode(self, messages: Messages, *, first: bool, prefix: str = "") -> list[int]:
        given = self.chat.text_ids(prefix) if prefix else []
        if first:
            return [*(await self.serving.engine_input(self.request, messages))["prompt_token_ids"], *given]
        return [*await context_ids(self.chat, messages), *given]

    async def write(self, ask: Ask, ids: list[int], seed: int | None, max_tokens: int) -> AsyncIterator[Piece]:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = self.request.to_sampling_params(max_tokens, self.serving.default_sampling_params)
        params.seed, params.n = seed, 1
        params.temperature = params.temperature if ask.temperature is None else ask.temperature
        if ask.stop:
            params.stop, params.output_text_buffer_length = list(ask.stop), max(map(len, ask.stop)) - 1
        params.output_kind = RequestOutputKind.DELTA if self.in_pieces else RequestOutputKind.FINAL_ONLY
        if ask.kind != "answer":
            params.logprobs = params.structured_outputs = None
        inputs = tokens_input(ids, cache_salt=self.request.cache_salt)
        name = f"{self.request_id}-{ask.sample}-{ask.round}-{ask.kind}"
        self.num_written[name] += 1
        name += f"-{self.num_written[name]}" if self.num_written[name] > 1 else ""
        round_number.set(ask.round)
        outputs = self.serving.engine_client.generate(inputs, params, name, priority=self.request.priority)
        try:
            async for output in outputs:
                (part,) = output.outputs
                self.serving._raise_if_error(part.finish_reason, name)
                token_ids = tuple(part.token_ids)
                cached = output.num_cached_tokens or 0
                stopped_at = part.stop_reason if isinstance(part.stop_reason, str) else ""
                yield Piece(part.text, len(token_ids), part.finish_reason, cached, output, token_ids, stopped_at)
        finally:
            await outputs.aclose()
