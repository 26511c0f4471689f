"""Routes, keys, places and errors of a replica; vLLM's part is a fake that replies at once, waits or fails."""

import asyncio
import json
import types

import pytest

from evolve_ray.serve import app as module
from evolve_ray.serve.app import App
from evolve_ray.serve.errors import RequestError
from evolve_ray.serve.settings import hash_key
from tests.plain.serve.examples import Exchange, request, settings

CHAT = "/v1/chat/completions"
KEY = "k" * 20


class Reply:
    """A reply of vLLM's class."""

    choices = ("one",)

    def model_dump(self):
        return {"choices": ["one"]}


class Serving:
    """vLLM's chat endpoint. What it does stands in the request's `do`."""

    def __init__(self):
        self.calls, self.cancelled = 0, 0
        self.engine_client = types.SimpleNamespace(errored=False, check_health=self.check_health)
        self.models = types.SimpleNamespace(show_available_models=self.show_models)

    async def check_health(self):
        if self.engine_client.errored:
            raise RuntimeError("dead")

    async def show_models(self):
        return types.SimpleNamespace(model_dump=lambda: {"object": "list", "data": [{"id": "tiny@3"}]})

    async def create_chat_completion(self, request, http):
        self.calls += 1
        if request.do == "wait":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if request.do == "refuse":
            error = types.SimpleNamespace(message="no such model", param="model", code=404)
            return types.SimpleNamespace(error=error)
        if request.do == "die":
            self.engine_client.errored = True
            raise RuntimeError("EngineCore died")
        if request.stream:
            return self.lines(request.do)
        return Reply()

    async def lines(self, do):
        if do == "fail first":
            yield 'data: {"error":{"message":"too long","param":"messages","code":400}}\n\n'
        yield "data: 1\n\n"
        yield "data: [DONE]\n\n"


class Counts:
    """The metrics: every request that ended."""

    def __init__(self):
        self.ended = []

    def request_ended(self, kind, status, seconds):
        self.ended.append((kind, status))

    def text(self):
        return b"# HELP\n"


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(module, "check_fields", lambda request, direct: None)

    def parse(content):
        values = {"n": None, "stream": False, "do": "reply", "seed": None} | content
        return types.SimpleNamespace(**values)

    monkeypatch.setattr(module, "parse_request", parse)

    def build(**options):
        fatal = []
        found = App(settings(**options), Serving(), None, None, Counts(), lambda: fatal.append(True))
        found.was_fatal = fatal
        return found

    return build


def direct(**more):
    return {"messages": [], "refine": {"rounds": 1}, **more}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 200), ("HEAD", "/", 200), ("GET", "/health", 200), ("GET", "/metrics", 200), ("GET", "/v1/models", 200),
     ("GET", "/v1/other", 404), ("GET", "/nothing", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405)],
)  # fmt: skip
def test_every_path_and_method(make, method, path, status):
    reply = request(make(), method, path)
    assert reply.status == status
    if status >= 400:
        assert path in reply.error["message"]
    if status == 405:
        assert reply.headers["allow"] in ("POST", "GET")


def test_the_page_is_sent_with_a_policy(make):
    reply = request(make(), "GET", "/")
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]


@pytest.mark.parametrize("header", [None, "", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer ", "Bearer", f"Bearer {KEY[:-1]}"])
def test_without_a_right_key_nothing_of_the_api_is_reached(make, header):
    app = make(keys=(hash_key("a" * 20), hash_key(KEY)))
    headers = {} if header is None else {"authorization": header}
    for path in ("/v1/models", CHAT, "/v1/anything"):
        reply = request(app, "POST", path, direct(), headers)
        assert reply.status == 401
        assert KEY not in reply.error["message"]
        assert reply.headers["www-authenticate"] == "Bearer"
    assert app.serving.calls == 0


@pytest.mark.parametrize("key", ["a" * 20, KEY])
def test_each_of_several_keys_opens(make, key):
    app = make(keys=(hash_key("a" * 20), hash_key(KEY)))
    for scheme in ("Bearer", "bearer"):
        assert request(app, "GET", "/v1/models", headers={"authorization": f"{scheme} {key}"}).status == 200
    assert request(app, "GET", "/health").status == 200


def test_a_direct_request_is_vllms_reply_and_counted(make):
    app = make()
    reply = request(app, "POST", CHAT, direct())
    assert json.loads(reply.content) == {"choices": ["one"]}
    reply = request(app, "POST", CHAT, direct(stream=True))
    assert reply.content == b"data: 1\n\ndata: [DONE]\n\n"
    assert (app.metrics.ended, app.taken) == ([("direct", 200)] * 2, 0)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        ({"refine": {"rounds": 99}}, 400, "refine.rounds"),
        (direct(n=17), 400, "n"),
        (direct(n=0), 400, "n"),
        (direct(do="refuse"), 404, "model"),
        (direct(do="fail first", stream=True), 400, "messages"),
    ],
)
def test_what_is_refused_gives_its_places_back(make, body, status, param):
    app = make()
    reply = request(app, "POST", CHAT, body)
    assert (reply.status, reply.error["param"]) == (status, param)
    assert (app.metrics.ended, app.taken) == ([("direct", status)], 0)


def test_a_request_without_a_place_is_refused_before_its_body_is_read(make):
    app = make(max_queued=0, retry_after_s=7)
    app.taken = app.settings.places
    reply = request(app, "POST", CHAT, b"not even JSON")
    assert (reply.status, reply.headers["retry-after"]) == (429, "7")
    assert "try again in 7 s" in reply.error["message"]
    assert app.serving.calls == 0
    assert app.taken == app.settings.places


def test_samples_take_places_each(make):
    app = make(max_queued=0)
    app.taken = app.settings.places - 3
    assert request(app, "POST", CHAT, direct(n=4)).status == 429
    assert request(app, "POST", CHAT, direct(n=3)).status == 200


def test_a_client_that_leaves_frees_the_engine_and_the_place(make):
    app = make()

    async def go():
        exchange = Exchange(app, "POST", CHAT, direct(do="wait"))
        task = asyncio.create_task(exchange.run())
        while not app.serving.calls:
            await asyncio.sleep(0)
        assert app.taken == 1
        exchange.leave()
        await task

    asyncio.run(go())
    assert (app.serving.cancelled, app.taken, app.metrics.ended) == (1, 0, [("direct", 499)])


def test_a_request_that_takes_too_long_is_ended(make):
    app = make(max_seconds=0.1)
    reply = request(app, "POST", CHAT, direct(do="wait"))
    assert (reply.status, reply.error["message"]) == (504, "the request took longer than 0.1 s; ask for less")
    assert app.taken == 0


def test_a_dead_engine_is_one_clean_error_and_ends_the_replica(make):
    app = make()
    reply = request(app, "POST", CHAT, direct(do="die"))
    assert (reply.status, reply.error["type"], app.was_fatal) == (503, "ServiceUnavailableError", [True])
    assert "EngineCore" not in reply.error["message"]
    assert reply.headers["retry-after"] == "2"
    assert request(app, "GET", "/health").status == 503


def test_the_last_message_must_be_the_users(make):
    app = make()
    app.serving._base_request_id = lambda http, given: "x"
    body = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    app_reply = request(app, "POST", CHAT, body)
    assert (app_reply.status, app_reply.error["param"]) == (400, "messages")


class NeedsAnswer:
    async def needs_answer(self, part, prompt):
        return True


@pytest.mark.parametrize("refine", [{"select": "best"}, {"strategy": "best_of"}, {"stop": "verified"}])
def test_what_compares_with_the_right_answer_wants_it(make, refine):
    app = make()
    app.scorer = NeedsAnswer()
    body = {"messages": [{"role": "user", "content": "a"}], "refine": refine}
    assert request(app, "POST", CHAT, body).error["param"] == "refine.answer"


def test_lifespan_messages_are_answered(make):
    sent = []

    async def receive():
        return {"type": "lifespan"}

    async def send(message):
        sent.append(message["type"])

    asyncio.run(make()({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_a_stream_that_ends_before_its_first_line_raises_that(make):
    async def broken():
        raise RequestError("no", status=409)
        yield ""

    with pytest.raises(RequestError, match="no"):
        asyncio.run(module.primed(broken()))
