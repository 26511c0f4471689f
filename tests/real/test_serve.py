"""`jobs/serve.py` on the model of the small run, with vLLM's engine, beside vLLM's own server."""

import asyncio
import collections
import json
import random
import re
import signal
import threading
import time

import httpx
import openai
import pytest

from evolve_ray.bench import servers
from evolve_ray.config.load import load_stored
from evolve_ray.models import checkpoints

CHAT = "/v1/chat/completions"
ATTEMPTS = 20
PROMPT = "sort:hbaicgdf"
CONVERSATION = [
    {"role": "user", "content": "sort:cab"}, {"role": "assistant", "content": "abc"}, {"role": "user", "content": PROMPT}
]  # fmt: skip
BODIES = [
    {"messages": [{"role": "user", "content": PROMPT}], "seed": 7, "temperature": 1.0, "max_tokens": 24},
    {"messages": CONVERSATION, "seed": 8, "temperature": 1.3, "top_p": 0.9, "max_tokens": 5, "n": 3},
    {"messages": CONVERSATION, "seed": 9, "temperature": 0.0, "max_tokens": 24, "logprobs": True, "top_logprobs": 2},
    {"messages": [{"role": "user", "content": PROMPT}], "seed": 1, "max_completion_tokens": 24, "stop": ["d"], "temperature": 1.0,
     "ignore_eos": True, "presence_penalty": 0.5},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def ours(small, folder):
    """The endpoint, as the command starts it."""
    server = servers.endpoint(str(small.run), servers.free_port(), folder, ["ray.dashboard=false"])
    try:
        server.wait()
        yield server
    finally:
        server.stop()
    assert server.process.returncode == 0, server.log.read_text()[-2000:]


@pytest.fixture(scope="module")
def theirs(small, folder):
    """vLLM's own server with the same model and engine."""
    config = load_stored(small.run, [])
    model = checkpoints.find(str(small.run)).folder
    server = servers.vllm(str(model), servers.free_port(), folder, servers.engine_arguments(config), config.engine.env)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def post(server, body, number=0):
    """The reply as it is sent, but with the time of its creation replaced. The id follows the one of the request."""
    headers = {"X-Request-Id": f"request-{number}"}
    reply = httpx.post(server.url + CHAT, json={"model": "model", **body}, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    return re.sub(r'"created":\d+', '"created":0', reply.text)


def events_by_choice(text):
    """The events of each choice in their order; which of several choices writes first depends on the load of the machine."""
    found = collections.defaultdict(list)
    for event in text.split("\n\n"):
        found["".join(re.findall(r'"choices":\[{"index":(\d)', event))].append(event)
    return found


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_one_round_is_byte_by_byte_what_vllm_serves(ours, theirs, number):
    body, one = BODIES[number], {"refine": {"rounds": 1}}
    assert post(ours, body | one, number) == post(theirs, body, number)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        streamed = body | {"stream": True} | options
        found = post(ours, streamed | one, number)
        for _ in range(ATTEMPTS):
            expected = post(theirs, streamed, number)
            if expected.count("\n") == found.count("\n"):  # else it has put tokens together that it read too late
                break
        if body.get("n", 1) == 1:
            assert found == expected
        else:
            assert events_by_choice(found) == events_by_choice(expected)


def test_the_first_round_is_the_direct_answer_and_all_are_repeatable_in_a_crowd(ours):
    body = BODIES[0] | {"refine": {"show": "all"}}
    alone = [json.loads(post(ours, body | {"seed": seed})) for seed in range(12)]
    direct = [json.loads(post(ours, BODIES[0] | {"seed": seed, "refine": {"rounds": 1}})) for seed in range(12)]

    async def crowd():
        async with httpx.AsyncClient(base_url=ours.url, timeout=60) as client:
            bodies = [{"model": "model", **body, "seed": seed, "stream": False} for seed in range(12)]
            others = [{"model": "model", **BODIES[0], "temperature": 1.5, "seed": None} for _ in range(12)]
            replies = await asyncio.gather(*[client.post(CHAT, json=part) for part in (*bodies, *others)])
            return [reply.json() for reply in replies[:12]]

    for one, other, first in zip(alone, asyncio.run(crowd()), direct, strict=True):
        assert texts(one) == texts(other)
        assert texts(one)[0] == first["choices"][0]["message"]["content"]
        assert len(texts(one)) == 4
    assert len({text for one in alone for text in texts(one)}) > 1


def texts(reply):
    return [part["text"] for part in reply["refine"]["rounds"]]


def test_the_official_client_sees_drafts_answer_usage_and_the_reason(ours):
    client = openai.OpenAI(base_url=f"{ours.url}/v1", api_key="none")
    more = {"extra_body": {"refine": {"rounds": 3, "answer": "abcdfghi"}}}
    stream = client.chat.completions.create(
        model="model", messages=BODIES[0]["messages"], seed=3, stream=True, stream_options={"include_usage": True}, **more
    )
    chunks = list(stream)
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    plain = client.chat.completions.create(model="model", messages=BODIES[0]["messages"], seed=3, **more)
    assert content == plain.choices[0].message.content
    (summary,) = [chunk.refine for chunk in chunks if "rounds" in (chunk.model_extra or {}).get("refine", {})]
    assert summary["stopped"] == plain.refine["stopped"] == "rounds"
    assert [part["seed"] for part in summary["rounds"]] == [part["seed"] for part in plain.refine["rounds"]]
    assert all(part["score"] is not None for part in summary["rounds"]), "the verifier scores every draft that is shown"
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert plain.usage.prompt_tokens == sum(part["usage"]["prompt_tokens"] for part in plain.refine["rounds"])


def test_a_cut_context_ends_with_what_there_is(ours, small):
    room = load_stored(small.run, []).model.context_tokens
    long = {"messages": [{"role": "user", "content": "x" * (room - 18)}], "max_tokens": 12, "ignore_eos": True, "seed": 1}
    reply = json.loads(post(ours, long))
    assert (reply["refine"]["stopped"], len(reply["refine"]["rounds"])) == ("context", 1)
    assert reply["choices"][0]["finish_reason"] == "length"


def metrics_of(server):
    lines = [line.rpartition(" ") for line in httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()]
    return {name: float(value) for name, _, value in lines if not name.startswith("#")}


def in_engine(metrics):
    """Requests that run or wait in the engine, as vLLM itself counts them."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    return sum(value for name, value in metrics.items() if name.startswith(names))


def test_requests_closed_at_random_moments_are_aborted_in_the_engine(ours):
    """A hundred, streamed and not; each would go on for sixteen rounds."""
    count, chance = 100, random.Random(18)
    before = metrics_of(ours)
    body = {"model": "model", **BODIES[0], "ignore_eos": True, "refine": {"rounds": 16}}

    async def go():
        async with httpx.AsyncClient(base_url=ours.url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:

            async def ask(stream):
                async with client.stream("POST", CHAT, json=body | {"stream": stream}) as reply:
                    assert reply.status_code == 200
                    async for _ in reply.aiter_bytes():
                        pass

            async def leave(task):
                await asyncio.sleep(chance.uniform(0, 0.5))
                assert not task.done()
                task.cancel()
                await asyncio.wait([task])

            tasks = [asyncio.create_task(ask(bool(number % 2))) for number in range(count)]
            while (await asyncio.to_thread(metrics_of, ours))["evolve_serve_running_rounds"] < 0.95 * count:
                await asyncio.sleep(0.05)
            await asyncio.gather(*map(leave, tasks))

    asyncio.run(go())
    end = time.monotonic() + 2
    while in_engine(after := metrics_of(ours)) or after["evolve_serve_running_rounds"]:
        assert time.monotonic() < end, "requests run on in the engine"
        time.sleep(0.1)
    left = 'evolve_serve_requests_total{kind="refined",status="499"}'
    assert after[left] - before.get(left, 0) == count
    aborted = after["evolve_serve_aborted_rounds_total"] - before["evolve_serve_aborted_rounds_total"]
    print(f"{aborted:g} of {count} aborted in the engine; the others were between two rounds")
    assert 0.8 * count <= aborted <= count
    time.sleep(1)
    assert tokens(metrics_of(ours), "generated") == tokens(after, "generated"), "no round after it"


def test_the_endpoint_ends_when_its_requests_have_ended(ours):
    """SIGTERM while requests run: they finish, then the command ends with 0 and leaves nothing behind. The last of its tests."""
    replies: list[httpx.Response] = []
    body = {"model": "model", **BODIES[0], "ignore_eos": True, "refine": {"rounds": 16}}
    ask = lambda: replies.append(httpx.post(ours.url + CHAT, json=body, timeout=60))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while metrics_of(ours)["evolve_serve_running_rounds"] < 8:
        assert time.monotonic() < end
    ours.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [200] * 8
    assert all(len(reply.json()["refine"]["rounds"]) == 16 for reply in replies)
    assert ours.process.wait(60) == 0
    assert "Traceback" not in ours.log.read_text()


@pytest.mark.long
def test_later_rounds_find_their_prefix_in_the_cache_of_their_replica(small, folder):
    """Two replicas, conversation layout: above 40 % of the prompt tokens of rounds >= 2."""
    place = folder / "two"
    place.mkdir()
    options = ["ray.dashboard=false", "serve.replicas=2"]
    server = servers.endpoint(str(small.run), servers.free_port(), place, options)
    try:
        server.wait()
        chance = random.Random(1)
        for seed in range(60):
            letters = "".join(chance.sample("abcdefghij", 10))
            post(server, BODIES[0] | {"messages": [{"role": "user", "content": f"sort:{letters}"}], "seed": seed})
        metrics = metrics_of(server)
    finally:
        server.stop()
    share = tokens(metrics, "cached") / tokens(metrics, "prompt")
    print(f"{share:.0%} of the prompt tokens of rounds >= 2 were cached")
    assert share > 0.4


def tokens(metrics, kind):
    """Those of rounds >= 2."""
    name = "evolve_serve_round_tokens_total"
    return sum(value for key, value in metrics.items() if key.startswith(name) and f'"{kind}"' in key and 'round="1"' not in key)
