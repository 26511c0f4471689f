"""What the benchmark of serving makes of its turns, and its load generator against a small server."""

import argparse
import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from evolve_ray.bench import load, serve, servers
from evolve_ray.bench.load import Answer, Reply
from evolve_ray.bench.serve import Turn, hits_row, ratio_rows
from evolve_ray.errors import ResourceError, UserError


def turn(seconds, tokens=(10, 20), first_s=0.01, cpu_s=1.0):
    return Turn(seconds, [Answer(0.5, [Reply(0.5, first_s, part, 30, "")]) for part in tokens], cpu_s)


def turns(**more):
    found = {(kind, side): [turn(2.0), turn(4.0)] for kind in serve.KINDS for side in serve.SIDES}
    return found | {tuple(key.split("_")): value for key, value in more.items()}


def test_ratios_are_ours_over_theirs_turn_by_turn():
    ours = [turn(1.0, cpu_s=2.0), turn(4.0)]
    made = {row.name: row for row in ratio_rows(turns(direct_ours=ours, stream_ours=[turn(2.0, first_s=0.02), turn(4.0)]))}
    assert {name: row.values for name, row in made.items()} == {
        "serve_direct_vs_vllm": [2.0, 1.0], "serve_stream_vs_vllm": [1.0, 1.0], "serve_ttft_vs_vllm": [2.0, 1.0],
        "serve_refine_vs_client_loop": [1.0, 1.0],
    }  # fmt: skip
    assert made["serve_direct_vs_vllm"].counts["CPU ratios"] == [0.5, 1.0]


def test_sides_that_did_other_work_are_not_compared():
    with pytest.raises(UserError, match="different work in 'stream'"):
        ratio_rows(turns(stream_ours=[turn(2.0, tokens=(10, 21)), turn(4.0)]))


def test_share_of_cached_tokens():
    assert hits_row({"prompt": 80.0, "cached": 20.0}, 2).values == [0.25]


@pytest.mark.parametrize(
    ("more", "message"),
    [({"clients": 0}, "--clients: is 0"), ({"requests": 10**6}, "--requests: is 1000000"), ({"new": [3, 2]}, "--new: is 3 2")],
)
def test_the_load_is_bounded(more, message):
    parser = argparse.ArgumentParser()
    serve.options(parser)
    args = parser.parse_args([])
    vars(args).update(more)
    with pytest.raises(UserError, match=message):
        serve.rows(args)


def test_flags_of_vllm_serve():
    args = {"enforce_eager": True, "enable_chunked_prefill": False, "max_model_len": 128, "x_y": {"a": 1}}
    assert servers.flags(args) == [
        "--enforce-eager", "--no-enable-chunked-prefill", "--max-model-len", "128", "--x-y", '{"a": 1}'
    ]  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Answers plain or streamed; a body with `fail` is refused."""

    protocol_version = "HTTP/1.1"
    running = most = 0
    lock = threading.Lock()

    def do_POST(self):
        with self.lock:
            Handler.running += 1
            Handler.most = max(Handler.most, Handler.running)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        usage = {"prompt_tokens": 5, "completion_tokens": 3}
        text = json.dumps({"choices": [{"message": {"content": "abc"}}], "usage": usage})
        if body.get("stream"):
            text = 'data: {"choices":[]}\n\ndata: ' + json.dumps({"usage": usage}, separators=(",", ":")) + "\n\ndata: [DONE]\n\n"
        self.send_response(429 if body.get("fail") else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        with self.lock:
            Handler.running -= 1
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


async def once(session, url, body):
    return [await load.request(session, url, body)]


@pytest.mark.parametrize("stream", [False, True])
def test_clients_share_the_requests_and_count_tokens(url, stream):
    answers, seconds = asyncio.run(load.drive(url, [{"stream": stream}] * 20, 4, 10.0, once))
    assert len(answers) == 20
    assert {(reply.tokens, reply.prompt_tokens) for answer in answers for reply in answer.replies} == {(3, 5)}
    assert all((reply.first_s > 0) == stream for answer in answers for reply in answer.replies)
    assert 0 < seconds < 10
    assert Handler.most <= 4


def test_no_request_is_started_when_the_time_is_over(url):
    answers, _ = asyncio.run(load.drive(url, [{}] * 50, 2, -1.0, once))
    assert answers == []


def test_a_refusal_ends_the_measurement(url):
    with pytest.raises(ResourceError, match="answered 429"):
        asyncio.run(load.drive(url, [{"fail": True}], 1, 10.0, once))


def test_a_server_that_ends_says_why(tmp_path):
    server = servers.Server("broken", ["sh", "-c", "echo first; echo the reason; exit 1"], 9, tmp_path / "log", {})
    with pytest.raises(ResourceError, match="broken did not start: the reason"):
        server.wait()
    server.stop()
