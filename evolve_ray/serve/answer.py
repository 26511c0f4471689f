"""The reply to a refined request, plain or streamed, made of vLLM's own response classes.

In a stream, every chunk is an ordinary one of OpenAI's. What is not the answer stands in a field `refine` beside the choices,
whose content is then empty: a client that does not know the field sees an answer that takes a while to begin.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from evolve_ray.serve.errors import RequestError
from evolve_ray.serve.request import Refinement
from evolve_ray.serve.rounds import Event, Outcome, Round, Rounds

DONE = "data: [DONE]\n\n"


class Answer:
    """One reply. `serving` is vLLM's chat endpoint, `request` vLLM's request, `rounds` have not started yet."""

    def __init__(self, serving: Any, request: Any, request_id: str, refinement: Refinement, rounds: Rounds):
        self.serving, self.request, self.request_id = serving, request, request_id
        self.refinement, self.rounds = refinement, rounds
        self.created = int(time.time())
        self.outcome: Outcome | None = None
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()  # None: all rounds are over
        self.side: list[str] = []  # lines about drafts that came while the answer was streamed

    async def plain(self) -> dict[str, Any]:
        """The reply as one JSON object."""
        self.outcome = await self.rounds.run()
        output = one(whole_output(self.outcome.chosen))
        response = await self.serving.chat_completion_full_generator(
            self.request, output, self.request_id, self.model_name, [], self.tokenizer, self.metadata()
        )
        if not hasattr(response, "choices"):
            raise RequestError(response.error.message, response.error.param, response.error.code)
        response.created = self.created
        response.usage = self.usage(self.rounds.rounds)
        return {**response.model_dump(), "refine": self.summary(self.outcome, texts=self.refinement.show_all)}

    async def stream(self) -> AsyncIterator[str]:
        """The reply as server-sent events. Raises before the first one if there is no reply."""
        self.rounds.emit = self.events.put_nowait
        running = asyncio.create_task(self.rounds.run())
        running.add_done_callback(lambda _: self.events.put_nowait(None))
        try:
            event = await self.events.get()
            if event is None:
                running.result()  # raises, or the strategy ended without a round
            yield self.line({"role": "assistant", "content": ""})
            last_lines: list[str] = []
            while event is not None:
                if event.name == "wrote" and event.round.is_live:
                    self.side += self.about(Event("started", event.round))
                    async for text in self.content(self.live(event), last_lines):
                        yield text
                for text in self.take(event):
                    yield text
                event = await self.events.get()
            self.outcome = running.result()
            if not last_lines:
                async for text in self.content(one(whole_output(self.outcome.chosen)), last_lines):
                    yield text
            for text in self.ending(last_lines, self.outcome):
                yield text
        finally:
            if not running.done():
                running.cancel()
                await asyncio.wait([running])

    def take(self, event: Event) -> list[str]:
        """Lines about a draft, if the client wants to see drafts, after those that waited."""
        lines, self.side = self.side + self.about(event), []
        return lines

    def about(self, event: Event) -> list[str]:
        if not self.refinement.show_all:
            return []
        round = event.round
        place: dict[str, Any] = {"round": round.ask.round, "sample": round.ask.sample, "kind": round.ask.kind}
        if event.name == "wrote":
            return (
                []
                if round.is_live or not event.piece or not event.piece.text
                else [self.line(refine=place | {"text": event.piece.text})]
            )
        if event.name == "started":
            return [self.line(refine=place | {"live": True})]
        if event.name == "scored":
            return [self.line(refine=place | {"score": round.score})]
        return [self.line(refine=place | self.figures(round))]

    async def live(self, event: Event | None) -> AsyncIterator[Any]:
        """The engine's outputs of the live round, while they come. Lines about other rounds wait in `side`."""
        while event is not None:
            if event.name == "wrote" and event.round.is_live and event.piece:
                yield event.piece.output
                if event.piece.finish_reason is not None:
                    return
            else:
                self.side += self.about(event)
            event = await self.events.get()
        self.events.put_nowait(None)

    async def content(self, outputs: AsyncIterator[Any], last_lines: list[str]) -> AsyncIterator[str]:
        """vLLM's chunks of some outputs. The one with the finish reason goes to `last_lines`: the summary is not known yet."""
        chunks = self.serving.chat_completion_stream_generator(
            self.request, outputs, self.request_id, self.model_name, [], self.tokenizer, self.metadata()
        )
        head = await anext(chunks)  # the role, which the client has already
        created = f'"created":{json.loads(head.removeprefix("data: "))["created"]},' if '"created":' in head else ""
        if not created:
            raise error_of(head)
        async for chunk in chunks:
            while self.side:
                yield self.side.pop(0)
            chunk = chunk.replace(created, f'"created":{self.created},', 1)
            if '"finish_reason":null' in chunk:  # inside a text, the quotes would be escaped
                yield chunk
            elif chunk != DONE and '"choices":[]' not in chunk:
                if '"error":{' in chunk and '"choices":' not in chunk:
                    raise error_of(chunk)
                last_lines.append(chunk)

    def ending(self, last_lines: list[str], outcome: Outcome) -> list[str]:
        """The last chunk of the answer with the summary of the rounds, the usage if it is wanted, and the end mark."""
        chunk: dict[str, Any] = json.loads(self.line({"content": ""}).removeprefix("data: "))
        if last_lines:
            chunk = json.loads(last_lines[0].removeprefix("data: "))
        chunk["choices"][0]["finish_reason"] = chunk["choices"][0]["finish_reason"] or outcome.chosen.finish_reason
        lines = [event_line(chunk | {"refine": self.summary(outcome, texts=False)})]
        options = self.request.stream_options
        if options and options.include_usage:
            usage = self.usage(self.rounds.rounds).model_dump(exclude_none=True)
            chunk = {key: value for key, value in chunk.items() if key in ("id", "object", "created", "model")}
            lines.append(event_line(chunk | {"choices": [], "usage": usage}))
        return [*lines, DONE]

    def line(self, delta: dict[str, str] | None = None, **more: Any) -> str:
        """A chunk; one about a draft has an empty content."""
        choice = {"index": 0, "delta": delta or {"content": ""}, "logprobs": None, "finish_reason": None}
        return event_line(
            {"id": self.request_id, "object": "chat.completion.chunk", "created": self.created, "model": self.model_name,
             "choices": [choice], **more}
        )  # fmt: skip

    def summary(self, outcome: Outcome, *, texts: bool) -> dict[str, Any]:
        """The field `refine` of a reply: which draft is the answer, why the rounds ended, what each of them took."""
        chosen = outcome.chosen.ask
        return {
            "strategy": self.refinement.strategy.name,
            "select": self.refinement.select,
            "stopped": outcome.stopped,
            "chosen": {"round": chosen.round, "sample": chosen.sample},
            "seconds": round(outcome.seconds, 4),
            "rounds": [
                {"round": part.ask.round, "sample": part.ask.sample, "kind": part.ask.kind, **self.figures(part)}
                | ({"text": part.text} if texts else {})
                for part in outcome.rounds
            ],
        }

    def figures(self, part: Round) -> dict[str, Any]:
        return {
            "finish_reason": part.finish_reason,
            "cut_by": part.cut_by or None,
            "score": part.score,
            "seed": part.seed,
            "seconds": round(part.seconds, 4),
            "usage": {
                "prompt_tokens": part.num_prompt_tokens,
                "completion_tokens": part.num_tokens,
                "cached_tokens": part.num_cached_tokens,
                "total_tokens": part.num_prompt_tokens + part.num_tokens,
            },
        }

    def usage(self, rounds: list[Round]) -> Any:
        """The usage of a request: the sums over its rounds."""
        from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo, UsageInfo

        prompt, written = sum(part.num_prompt_tokens for part in rounds), sum(part.num_tokens for part in rounds)
        cached = sum(part.num_cached_tokens for part in rounds)
        return UsageInfo(
            prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written,
            prompt_tokens_details=PromptTokenUsageInfo(cached_tokens=cached),
        )  # fmt: skip

    @property
    def model_name(self) -> str:
        return self.serving.models.model_name()

    @property
    def tokenizer(self) -> Any:
        return self.serving.renderer.tokenizer

    def metadata(self) -> Any:
        from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata

        return RequestResponseMetadata(request_id=self.request_id)


def event_line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_of(chunk: str) -> RequestError:
    """The error that vLLM wrote into a stream."""
    error = json.loads(chunk.removeprefix("data: "))["error"]
    return RequestError(error["message"], error.get("param"), error.get("code") or 500)


async def one(output: Any) -> AsyncIterator[Any]:
    yield output


def whole_output(part: Round) -> Any:
    """The engine's outputs of a round as one; a round that was cut has the finish reason `length`."""
    first, *more = part.outputs
    for output in more:
        first.add(output, aggregate=True)
    part.outputs = [first]
    first.outputs[0].finish_reason = first.outputs[0].finish_reason or part.finish_reason
    return first
