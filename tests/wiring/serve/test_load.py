"""More requests than places, clients that leave, replicas that die, an end with requests under way: through a real Serve."""

import asyncio
import collections
import json
import random
import threading
import time

import httpx
import openai
import psutil
import pytest

from tests.wiring.serve.conftest import QUEUED, RUNNING
from tests.wiring.serve.test_fuzz import is_clean

CHAT = "/v1/chat/completions"
REPLICAS = 2


def gone(metrics):
    return metrics["evolve_serve_running_rounds"] == 0


def total(metrics, name):
    return sum(value for key, value in metrics.items() if key.startswith(name))


def started(metrics):
    """Rounds that have begun: those that ended count their prompt, those that run are a gauge."""
    return metrics["evolve_serve_running_rounds"] + total(metrics, "evolve_serve_round_seconds_total")


def test_a_full_endpoint_refuses_with_retry_after_before_a_token_is_spent(endpoint):
    places = REPLICAS * (RUNNING + QUEUED)

    async def go():
        async with endpoint.asynchronous() as client:
            body = endpoint.body("slow", refine={"rounds": 2}, max_tokens=100)
            tasks = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(2 * places)]
            done, running = await asyncio.wait(tasks, timeout=3)
            refused = [task.result() for task in done]
            for task in running:
                task.cancel()
            await asyncio.wait(running)
            return refused

    refused = asyncio.run(go())
    assert len(refused) == places, collections.Counter(reply.status_code for reply in refused)
    for reply in refused:
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "2")
        assert is_clean(reply.status_code, reply.text)
    endpoint.until(gone, "the running requests are aborted")
    with pytest.raises(openai.BadRequestError, match="at most 8 rounds at a time"):
        endpoint.client().chat.completions.create(
            model=endpoint.model, messages=[{"role": "user", "content": "x"}],
            extra_body={"refine": {"strategy": "parallel", "samples": 16}},
        )  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refine", [{"rounds": 1}, {"rounds": 4}, {"strategy": "parallel", "samples": 2}])
def test_a_client_that_leaves_ends_its_rounds(endpoint, stream, refine):
    before = endpoint.metrics()
    body = endpoint.body("slow", stream=stream, refine=refine)

    async def go():
        async with endpoint.asynchronous() as client:

            async def ask():
                async with client.stream("POST", CHAT, json=body) as reply:
                    async for _ in reply.aiter_bytes():
                        pass

            tasks = [asyncio.create_task(ask()) for _ in range(4)]
            await asyncio.sleep(1.5)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    asyncio.run(go())
    after = endpoint.until(gone, "no round runs on", seconds=2)
    rounds = 4 * (2 if "samples" in refine else 1)
    assert after["evolve_serve_aborted_rounds_total"] - before.get("evolve_serve_aborted_rounds_total", 0) == rounds
    time.sleep(1)
    later = endpoint.metrics()
    assert total(later, "evolve_serve_round_tokens_total") == total(after, "evolve_serve_round_tokens_total"), "no round after it"


def test_a_replica_that_dies_gives_one_clean_error_and_is_replaced(endpoint):
    pids = set(endpoint.pids())
    assert len(pids) == REPLICAS
    neighbour: list = []
    thread = threading.Thread(target=lambda: neighbour.append(finish_on_another(endpoint)))
    thread.start()
    reply = httpx.post(endpoint.url + CHAT, json=endpoint.body("die", refine={"rounds": 1}), headers=endpoint.headers, timeout=60)
    assert reply.status_code == 503
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
    assert "Traceback" not in reply.text
    assert reply.headers["retry-after"]
    thread.join()
    assert set(neighbour[0]) <= {200, 429, 503}
    assert 200 in neighbour[0], "the other replica went on"
    end = time.monotonic() + 120
    while len(found := set(endpoint.pids())) < REPLICAS or found == pids:
        assert time.monotonic() < end
        time.sleep(0.5)
    assert len(pids & found) == REPLICAS - 1
    wait_until_both_answer(endpoint)


def finish_on_another(endpoint):
    """The states of short requests that go on while a replica dies."""
    states = []
    for _ in range(40):
        body = endpoint.body("abc", refine={"rounds": 2})
        states.append(httpx.post(endpoint.url + CHAT, json=body, headers=endpoint.headers, timeout=60).status_code)
        time.sleep(0.05)
    return states


def wait_until_both_answer(endpoint):
    """Both replicas take requests, when twice the places of one are taken."""
    end = time.monotonic() + 120
    while True:
        body = endpoint.body("slow", max_tokens=20, refine={"rounds": 1})
        states = states_of(endpoint, [body] * (RUNNING + QUEUED + 1))
        if set(states) == {200}:
            return
        assert time.monotonic() < end, states
        time.sleep(1)


def states_of(endpoint, bodies):
    async def go():
        async with endpoint.asynchronous() as client:
            replies = await asyncio.gather(*[client.post(CHAT, json=body) for body in bodies])
            return [reply.status_code for reply in replies]

    return asyncio.run(go())


def test_a_stream_whose_replica_dies_ends_with_an_error_event(endpoint):
    body = endpoint.body("die", stream=True, refine={"rounds": 1})
    with httpx.stream("POST", endpoint.url + CHAT, json=body, headers=endpoint.headers, timeout=60) as reply:
        events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert reply.status_code == 200
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == 503
    assert all("choices" in json.loads(event) for event in events[:-2])
    wait_until_both_answer(endpoint)


@pytest.mark.long
def test_a_thousand_requests_of_sixty_four_clients_though_a_replica_is_killed_twice(endpoint):
    clients, count = 64, 1000
    chance = random.Random(18)
    before = endpoint.metrics()

    async def go():
        numbers = iter(range(count))
        states: dict[int, list] = collections.defaultdict(list)

        async def work(client):
            for number in numbers:
                stream = number % 3 == 0
                body = endpoint.body(f"number {number}", stream=stream, seed=number, refine={"rounds": 1 + number % 4})
                states[number].append(await answer_of(client, body, stream))

        async def kill():
            for _ in range(2):
                await asyncio.sleep(4)
                pid = chance.choice(await asyncio.to_thread(endpoint.pids))
                psutil.Process(pid).kill()

        async with endpoint.asynchronous() as client:
            await asyncio.gather(kill(), *[work(client) for _ in range(clients)])
        return states

    states = asyncio.run(go())
    assert sorted(states) == list(range(count)), "none is lost"
    assert all(len(replies) == 1 for replies in states.values()), "none is doubled"
    counts = collections.Counter(status for ((status, _),) in states.values())
    print(counts)
    assert set(counts) <= {200, 429, 503}
    assert counts[200] > count / 10
    wait_until_both_answer(endpoint)
    alone = {number: text for number, ((status, text),) in states.items() if status == 200 and number % 3}
    for number in chance.sample(sorted(alone), 20):  # in a crowd as alone
        body = endpoint.body(f"number {number}", seed=number, refine={"rounds": 1 + number % 4})
        reply = httpx.post(endpoint.url + CHAT, json=body, headers=endpoint.headers, timeout=60)
        assert reply.json()["choices"][0]["message"]["content"] == alone[number]
    assert endpoint.metrics()["evolve_serve_running_rounds"] == 0
    assert before is not None


async def answer_of(client, body, stream):
    """(status, text) of one request; a refusal and an error must be clean. An error event of a stream counts as its status."""
    reply = await client.post(CHAT, json=body)
    if reply.status_code != 200:
        error = reply.json()["error"]
        assert error["code"] == reply.status_code
        assert reply.headers["retry-after"]
        return reply.status_code, error["message"]
    if not stream:
        return 200, reply.json()["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    last = json.loads(events[-2])
    return (last["error"]["code"], "") if "error" in last else (200, "")
