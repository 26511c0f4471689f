"""Two thousand bodies that are wrong: each is answered with a 4xx in OpenAI's envelope, and costs no token."""

import asyncio
import json

from tests.wiring.serve.bodies import bodies

COUNT, AT_A_TIME = 2000, 4


def test_every_wrong_body_is_the_clients_error(endpoint):
    before = endpoint.metrics()

    async def go():
        gate = asyncio.Semaphore(AT_A_TIME)
        async with endpoint.asynchronous() as client:

            async def send(why, body):
                async with gate:
                    headers = {"Content-Type": "application/json"}
                    reply = await client.post("/v1/chat/completions", content=body, headers=headers)
                    return why, reply.status_code, reply.text

            return await asyncio.gather(*[send(*wrong) for wrong in bodies(endpoint.model, COUNT, seed=18)])

    replies = asyncio.run(go())
    assert len(replies) == COUNT
    wrong = sorted({(why, status, text[:300]) for why, status, text in replies if not is_clean(status, text)})
    assert wrong == [], "\n".join(map(str, wrong))
    after = endpoint.metrics()
    assert tokens(after) == tokens(before)
    assert after["evolve_serve_running_rounds"] == 0


def is_clean(status, text):
    """Whether a reply is a 4xx with OpenAI's error object of one sentence."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    message = error.get("message") or ""
    return (
        400 <= status < 500
        and set(error) == {"message", "type", "param", "code"}
        and error["code"] == status
        and 0 < len(message) < 600
        and "Traceback" not in message
        and "\n" not in message
    )


def tokens(metrics):
    return sum(value for name, value in metrics.items() if name.startswith("evolve_serve_round_tokens_total"))
