"""The HTTP side of a replica, as an ASGI application: routes, keys, limits, errors; requests become answers here.

Serve's proxy stands in front of it, with `Guard` of `guard.py` around it.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from evolve_ray.config.plugs import find_plug, takes, with_args
from evolve_ray.models.chat import Chat
from evolve_ray.refine.strategies import ALL_STRATEGIES
from evolve_ray.serve.answer import Answer, error_of
from evolve_ray.serve.body import parse_json, parse_request, read_bytes
from evolve_ray.serve.engine import RoundWriter, check_fields, plain_messages
from evolve_ray.serve.errors import RequestError, encode
from evolve_ray.serve.metrics import ServeMetrics
from evolve_ray.serve.page import HEADERS, page
from evolve_ray.serve.request import Refinement
from evolve_ray.serve.rounds import Rounds, Scorer
from evolve_ray.serve.settings import Settings, hash_key
from evolve_ray.serve.stream import CLIENT_LEFT, EventStream, unless_gone

GRACE_S = 10.0  # the rounds of a refined request end by themselves at `serve.max_seconds`; their answer may still be sent
GUARDED = "/v1/"  # what needs a key, where there are keys
Handler = Callable[[Request], Awaitable[Response | EventStream]]
log = logging.getLogger("ray.serve")


class App:
    """One replica's endpoint. `scorer` is None if nothing can be scored; `fatal` is called when the engine is dead."""

    def __init__(
        self, settings: Settings, serving: Any, chat: Chat, scorer: Scorer | None, metrics: ServeMetrics,
        fatal: Callable[[], None],
    ):  # fmt: skip
        self.settings, self.serving, self.chat, self.scorer = settings, serving, chat, scorer
        self.metrics, self.fatal = metrics, fatal
        self.rules, self.limits = settings.rules, settings.config.serve
        self.taken = 0  # of `settings.places`
        self.html = page(settings)
        self.routes: dict[str, dict[str, Handler]] = {
            "/": {"GET": self.get_page},
            "/health": {"GET": self.get_health},
            "/metrics": {"GET": self.get_metrics},
            "/v1/models": {"GET": self.get_models},
            "/v1/chat/completions": {"POST": self.complete},
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        if scope["type"] != "http":
            return
        request = Request(scope, receive, send)
        try:
            response = await self.handler(request)(request)
        except RequestError as error:
            response = Response(encode(error.body()), error.status, error.headers, "application/json")
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    def handler(self, request: Request) -> Handler:
        """The handler of a request; raises RequestError if there is none, or if the key is missing."""
        path = request.url.path
        if path.startswith(GUARDED):
            self.check_key(request)
        methods = self.routes.get(path)
        if methods is None:
            raise RequestError(f"{path}: there is nothing at this path; use one of {', '.join(self.routes)}", status=404)
        method = "GET" if request.method == "HEAD" else request.method
        if method not in methods:
            allowed = ", ".join(methods)
            raise RequestError(f"{path}: does not take {request.method}; use {allowed}", status=405, headers={"Allow": allowed})
        return methods[method]

    def check_key(self, request: Request) -> None:
        """Raises RequestError unless the request has one of the keys. It is compared with all of them, in constant time."""
        if not self.settings.key_hashes:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        sent = hash_key(key.strip()) if scheme.lower() == "bearer" else ""
        matches = [hmac.compare_digest(sent, key_hash) for key_hash in self.settings.key_hashes]
        if not any(matches):
            message = "the key is missing or wrong; send it in the header Authorization: Bearer KEY"
            raise RequestError(message, status=401, headers={"WWW-Authenticate": "Bearer"})

    async def get_page(self, request: Request) -> Response:
        return Response(self.html, media_type="text/html", headers=HEADERS)

    async def get_health(self, request: Request) -> Response:
        try:
            await self.serving.engine_client.check_health()
        except Exception as error:
            raise self.failure(error) from None
        return Response(status_code=200)

    async def get_metrics(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(self.metrics.text), media_type="text/plain; version=0.0.4")

    async def get_models(self, request: Request) -> Response:
        models = await self.serving.models.show_available_models()
        return JSONResponse(models.model_dump())

    async def complete(self, http: Request) -> Response | EventStream:
        """POST /v1/chat/completions."""
        ticket = Ticket(self)
        try:
            return await self.respond(http, ticket)
        except (asyncio.CancelledError, ClientDisconnect):
            ticket.close(CLIENT_LEFT)
            raise
        except Exception as error:
            failure = self.failure(error)
            ticket.close(failure.status)
            raise failure from None

    async def respond(self, http: Request, ticket: "Ticket") -> Response | EventStream:
        """The response; the ticket is closed with it, for a stream at its end."""
        ticket.take(0)  # before the body is read: a replica without places spends nothing on a request
        content = parse_json(await read_bytes(http, self.limits.max_body_kib << 10))
        refine = content.pop("refine", None)
        request = parse_request(content)
        refinement = self.rules.read(refine, stream=bool(request.stream))
        check_fields(request, direct=refinement.is_direct)
        samples = 1 if request.n is None else request.n
        if not 1 <= samples <= self.limits.max_samples:
            raise RequestError(f"n: is {samples}, but must be at least 1 and at most {self.limits.max_samples}", "n")
        ticket.kind = "direct" if refinement.is_direct else "refined"
        ticket.take(samples if refinement.is_direct else refinement.width)
        if refinement.is_direct:
            reply = await unless_gone(http, self.direct(http, request))
        else:
            answer = await self.answer(http, request, refinement)
            reply = primed(answer.stream()) if request.stream else unless_gone(http, answer.plain())
            reply = await reply
            ticket.answer = answer
        if request.stream:
            return EventStream(reply, ticket.close, self.failure, self.limits.max_seconds + GRACE_S)
        ticket.close(200)
        return JSONResponse(reply)

    async def direct(self, http: Request, request: Any) -> Any:
        """vLLM's own reply: the content of the response, or an iterator over the lines of its stream."""
        reply = await asyncio.wait_for(self.serving.create_chat_completion(request, http), self.limits.max_seconds)
        if request.stream and hasattr(reply, "__aiter__"):
            return await primed(reply)
        if not hasattr(reply, "choices"):
            raise refused(reply)
        return reply.model_dump()

    async def answer(self, http: Request, request: Any, refinement: Refinement) -> Answer:
        """A refined reply, not started. Raises RequestError for what can be known before a token is spent."""
        *earlier, last = plain_messages(request)
        if last["role"] != "user":
            raise RequestError("messages: the last one must be of the user, because that is what is refined", "messages")
        await self.check_scorable(refinement, last["content"])
        request_id = f"chatcmpl-{self.serving._base_request_id(http, request.request_id)}"
        in_pieces = bool(request.stream) or refinement.deadline_s is not None
        shows_scores = refinement.show_all and self.scorer is not None and self.settings.has_scorer
        if shows_scores and refinement.answer is None:
            shows_scores = not await self.scorer.needs_answer("scorer", last["content"])  # type: ignore[union-attr]
        name, args = refinement.strategy.name, refinement.strategy.args
        strategy = with_args("strategy.args", name, find_plug(ALL_STRATEGIES, name, "strategy.name"), args)
        row: dict[str, Any] = {
            "prompt_id": None,
            "prompt": last["content"],
            "answer": refinement.answer,
            "draft": None,
            "columns": {},
        }
        rounds = Rounds(
            refinement=refinement,
            strategy=strategy(
                last["content"], self.settings.template, refinement.strategy, **({"row": row} if takes(strategy, "row") else {})
            ),
            earlier=tuple(earlier),
            prompt=last["content"],
            engine=RoundWriter(self.serving, self.chat, request, request_id, self.settings, in_pieces=in_pieces),
            scorer=self.scorer,
            shows_scores=shows_scores,
            seed=request.seed,
            max_seconds=self.limits.max_seconds,
            stream=bool(request.stream),
        )
        if (error := await self.serving._check_model(request)) is not None:
            raise refused(error)
        return Answer(self.serving, request, request_id, refinement, rounds)

    async def check_scorable(self, refinement: Refinement, prompt: str) -> None:
        """Raises RequestError if the request needs a value that cannot be computed without the answer that it does not give."""
        if refinement.answer is not None or self.scorer is None:
            return
        needed = ["scorer"] if refinement.select == "best" or self.rules.asks_scorer(refinement.strategy) else []
        needed += ["verifier"] if refinement.verified else []
        for part in needed:
            if await self.scorer.needs_answer(part, prompt):
                raise RequestError(
                    f"refine.answer: is missing, and the {part} of this endpoint compares with the right answer; give it, or "
                    "use refine.select 'last' or 'vote' and no stop.verified",
                    "refine.answer",
                )

    def failure(self, error: BaseException) -> RequestError:
        """What the client is told about an error. Whose fault one of vLLM's errors is, vLLM knows."""
        if isinstance(error, RequestError):
            return error
        retry = {"Retry-After": str(self.limits.retry_after_s)}
        if self.serving.engine_client.errored:
            self.fatal()
            return RequestError("the engine of this replica has ended; it is replaced now, try again", status=503, headers=retry)
        if isinstance(error, TimeoutError):
            return RequestError(f"the request took longer than {self.limits.max_seconds:g} s; ask for less", status=504)
        from vllm.entrypoints.serve import create_error_response

        described = create_error_response(error if isinstance(error, Exception) else str(error)).error
        if described.code < 500:
            return RequestError(described.message, described.param, described.code)
        log.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
        return RequestError("the endpoint failed on this request; its log says why", status=500)


class Ticket:
    """The places of a request, and its entry in the metrics; `close` gives both back, once."""

    def __init__(self, app: App):
        self.app, self.kind, self.started = app, "direct", time.monotonic()
        self.width, self.is_open = 0, True
        self.answer: Answer | None = None

    def take(self, width: int) -> None:
        """Takes places for the rounds that run at the same time. Raises RequestError if there are not enough."""
        app, places = self.app, self.app.settings.places
        if width > places:
            field = "refine.strategy.samples"
            raise RequestError(f"{field}: this endpoint runs at most {places} rounds at a time; ask for fewer", field)
        if app.taken + max(1, width) > places:
            wait = app.limits.retry_after_s
            message = f"all {places} places of this replica are taken; try again in {wait} s"
            raise RequestError(message, status=429, headers={"Retry-After": str(wait)})
        app.taken += width
        self.width += width

    def close(self, status: int) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self.app.taken -= self.width
        self.app.metrics.request_ended(self.kind, status, time.monotonic() - self.started)
        if self.answer and self.answer.outcome:
            outcome = self.answer.outcome
            self.app.metrics.refined(outcome.stopped, outcome.rounds[0].score, outcome.chosen.score)


def refused(reply: Any) -> RequestError:
    """The error object that vLLM returned."""
    return RequestError(reply.error.message, reply.error.param, reply.error.code)


async def primed(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream whose first line is there. Raises what went wrong before it, so that it gets a status of its own."""
    try:
        first = await anext(lines)
    except BaseException:
        await lines.aclose()  # type: ignore[attr-defined]
        raise
    if first.startswith('data: {"error":'):
        await lines.aclose()  # type: ignore[attr-defined]
        raise error_of(first)

    async def whole() -> AsyncIterator[str]:
        try:
            yield first
            async for line in lines:
                yield line
        finally:
            await lines.aclose()  # type: ignore[attr-defined]

    return whole()


async def lifespan(receive: Any, send: Any) -> None:
    """Serve starts and ends an application by these messages; the engine is already there."""
    for stage in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{stage}.complete"})
