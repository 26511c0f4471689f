"""Compares the endpoint of `jobs/serve.py` with `vllm serve`, both up at the same time on loopback, used in turns.

A request writes a set number of tokens, so both sides do the same work; the numbers vary from request to request. The load is
bounded by `--requests` and `--seconds`.

* `serve_direct_vs_vllm`, `serve_stream_vs_vllm`: tokens/s with one round, plain and streamed, over those of `vllm serve`;
* `serve_ttft_vs_vllm`: median time to the first token of the streamed requests, over that of `vllm serve`;
* `serve_refine_vs_client_loop`: answers/s of several rounds, over those of a client that calls `vllm serve` once for each round;
* `serve_cache_hits`: share of the prompt tokens of rounds >= 2 that came from the cache of a replica.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.bench import load, servers, table
from evolve_ray.bench.generate import CPU_ARGUMENTS, CPU_ENV, LETTERS, random_model
from evolve_ray.bench.load import Answer, Body, Reply
from evolve_ray.bench.table import Row
from evolve_ray.config.load import load_stored
from evolve_ray.errors import UserError
from evolve_ray.models import checkpoints
from evolve_ray.refine.template import Template, load_template

MAX_REQUESTS, MAX_CLIENTS = 10_000, 256
KINDS = ("direct", "stream", "refine")
NAMES = {"direct": "serve_direct_vs_vllm", "stream": "serve_stream_vs_vllm", "refine": "serve_refine_vs_client_loop"}
SIDES = ("ours", "theirs")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="RUN", help="a run, whose model and engine are used; else a random Llama")
    parser.add_argument("--repeats", type=int, default=4, help="timed turns of each side")
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--requests", type=int, default=160, help="requests of a turn; a quarter of it for several rounds")
    parser.add_argument("--seconds", type=float, default=60.0, help="after this time a turn starts no further request")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of a refined answer")
    parser.add_argument("--prompt", type=int, default=48, help="letters of a prompt")
    parser.add_argument("--new", type=int, nargs=2, default=[8, 96], metavar=("LEAST", "MOST"), help="tokens of a response")
    parser.add_argument("--replicas", type=int, default=1, help="replicas of the endpoint; more than one: only serve_cache_hits")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


@dataclass(frozen=True)
class Turn:
    """What one side did in one turn."""

    seconds: float
    answers: list[Answer]
    cpu_s: float  # of the server and all that it has started

    @property
    def tokens(self) -> int:
        return sum(reply.tokens for answer in self.answers for reply in answer.replies)

    @property
    def speed(self) -> float:
        """Tokens/s."""
        return self.tokens / self.seconds

    @property
    def rate(self) -> float:
        """Answers/s."""
        return len(self.answers) / self.seconds

    @property
    def first_ms(self) -> float:
        """The median time to the first token."""
        return 1000 * statistics.median(answer.replies[0].first_s for answer in self.answers)

    def summary(self) -> str:
        waits = sorted(answer.seconds for answer in self.answers)
        return (
            f"{len(waits)} answers, {self.tokens} tokens, {self.seconds:.1f} s, CPU {self.cpu_s:.1f} s, "
            f"{self.speed:.0f} tokens/s, {self.rate:.1f} answers/s; of an answer {statistics.median(waits):.2f} s, "
            f"of one in twenty {waits[int(0.95 * len(waits))]:.2f} s or more"
        )


def rows(args: argparse.Namespace) -> list[Row]:
    for name, value, most in (("clients", args.clients, MAX_CLIENTS), ("requests", args.requests, MAX_REQUESTS)):
        if not 1 <= value <= most:
            raise UserError(f"--{name}: is {value}, but must be from 1 to {most}")
    if not 0 < args.new[0] <= args.new[1]:
        raise UserError(f"--new: is {args.new[0]} {args.new[1]}, but must be 1 <= LEAST <= MOST")
    with tempfile.TemporaryDirectory() as folder:
        return Bench(args, Path(folder)).rows()


class Bench:
    """Both servers and the loads for them."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        engine_env: dict[str, str] = {**CPU_ENV, "OMP_NUM_THREADS": "1"}
        self.overrides = ["ray.dashboard=false", f"serve.replicas={args.replicas}", f"strategy.rounds={args.rounds}"]
        if args.model:
            found = checkpoints.find(args.model)
            if not found.run:
                raise UserError(f"--model: {args.model}: is not a run directory; name a run, or leave it out")
            config = load_stored(found.run, [])
            self.model, self.given = str(found.folder), args.model
            engine_args, engine_env = servers.engine_arguments(config), engine_env | config.engine.env
            self.template: Template = load_template(config.template.name, config.template.layout, "chain")
        else:
            self.model = self.given = str(folder / "model")
            random_model(folder / "model", args)
            engine_args = CPU_ARGUMENTS | {"dtype": args.dtype, "max_num_seqs": 128}
            inline = ", ".join(f"{name} = {json.dumps(value)}" for name, value in CPU_ARGUMENTS.items())
            env = ", ".join(f'{name} = "{value}"' for name, value in engine_env.items())
            self.overrides += [f"model.dtype={args.dtype}", "template.name=tiny", "engine.max_num_seqs=128",
                               f"engine.args={{{inline}}}", f"engine.env={{{env}}}", "engine.cpus_per_actor=0.5"]  # fmt: skip
            self.template = load_template("tiny", "conversation", "chain")
        self.engine_args, self.engine_env = engine_args, engine_env

    def rows(self) -> list[Row]:
        ours = servers.endpoint(self.given, servers.free_port(), self.folder, self.overrides)
        started = [ours]
        try:
            ours.wait()
            if self.args.replicas > 1:
                for repeat in table.turns("serve", self.args.repeats):
                    self.turn("refine", "ours", ours, repeat)
                return [hits_row(counts_of(ours.url), self.args.replicas)]
            theirs = servers.vllm(self.model, servers.free_port(), self.folder, self.engine_args, self.engine_env)
            started.append(theirs)
            theirs.wait()
            return [*ratio_rows(self.turns({"ours": ours, "theirs": theirs})), hits_row(counts_of(ours.url), 1)]
        finally:
            for server in started:
                server.stop()

    def turns(self, sides: dict[str, servers.Server]) -> dict[tuple[str, str], list[Turn]]:
        """The turns of each kind and side after one to warm up; the side that goes first changes."""
        found: dict[tuple[str, str], list[Turn]] = {(kind, side): [] for kind in KINDS for side in SIDES}
        for repeat in table.turns("serve", self.args.repeats + 1):
            for kind in KINDS:
                for side in SIDES if repeat % 2 else reversed(SIDES):
                    found[kind, side].append(self.turn(kind, side, sides[side], repeat))
        return {key: turns[1:] for key, turns in found.items()}

    def turn(self, kind: str, side: str, server: servers.Server, repeat: int) -> Turn:
        count = self.args.requests if kind != "refine" else max(self.args.clients, self.args.requests // 4)
        bodies = [self.body(kind, repeat, number) for number in range(count)]
        work: Callable[[Any, str, Any], Awaitable[list[Reply]]] = self.once
        if kind == "refine" and side == "theirs":
            work = self.loop
        elif side == "ours":
            rounds = self.args.rounds if kind == "refine" else 1
            bodies = [body | {"refine": {"rounds": rounds}} for body in bodies]
        before = server.cpu_s()
        answers, seconds = asyncio.run(load.drive(server.url, bodies, self.args.clients, self.args.seconds, work))
        return Turn(seconds, answers, server.cpu_s() - before)

    def body(self, kind: str, repeat: int, number: int) -> Body:
        """A request that no other turn has sent, so that no cache knows it; both sides get the same ones."""
        chance = random.Random(f"{kind} {repeat} {number}")
        text = "".join(chance.choices(LETTERS, k=self.args.prompt))
        body = {
            "model": "model", "messages": list(self.template.direct(text)), "seed": number, "temperature": 1.0, "top_p": 1.0,
            "max_tokens": chance.randint(*self.args.new), "ignore_eos": True,
        }  # fmt: skip
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if kind == "stream" else {})

    async def once(self, session: Any, url: str, body: Body) -> list[Reply]:
        return [await load.request(session, url, body)]

    async def loop(self, session: Any, url: str, body: Body) -> list[Reply]:
        """What a client does that refines by itself: one call for each round, the last draft in the next one."""
        replies = [await load.request(session, url, body)]
        prompt = body["messages"][-1]["content"]
        for _ in range(2, self.args.rounds + 1):
            messages = list(self.template.refinement(prompt, replies[-1].text))
            replies.append(await load.request(session, url, body | {"messages": messages}))
        return replies


def ratio_rows(turns: dict[tuple[str, str], list[Turn]]) -> list[Row]:
    """The rows of both sides; raises UserError if the sides of a turn wrote different numbers of tokens."""
    found = []
    for kind in KINDS:
        pairs = list(zip(turns[kind, "ours"], turns[kind, "theirs"], strict=True))
        for ours, theirs in pairs:
            if (ours.tokens, len(ours.answers)) != (theirs.tokens, len(theirs.answers)):
                raise UserError(
                    f"serve: the sides did different work in {kind!r} ({ours.summary()}; {theirs.summary()}); raise --seconds"
                )
        counts: dict[str, Any] = {"evolve-ray": pairs[0][0].summary(), "vllm serve": pairs[0][1].summary()}
        counts["CPU ratios"] = [round(theirs.cpu_s / ours.cpu_s, 2) for ours, theirs in pairs]
        found.append(Row(NAMES[kind], "x", [ours.rate / theirs.rate for ours, theirs in pairs], counts))
        if kind == "stream":
            times = {side: f"{statistics.median(turn.first_ms for turn in turns[kind, side]):.1f} ms" for side in SIDES}
            found.append(Row("serve_ttft_vs_vllm", "x", [ours.first_ms / theirs.first_ms for ours, theirs in pairs], times))
    return found


def counts_of(url: str) -> dict[str, float]:
    """Prompt tokens of rounds >= 2, and those of them that were cached, out of the metrics of the endpoint."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    counts = {"prompt": 0.0, "cached": 0.0}
    for line in lines:
        if line.startswith("evolve_serve_round_tokens_total{") and 'round="1"' not in line:
            for kind in counts:
                counts[kind] += float(line.rpartition(" ")[2]) if f'kind="{kind}"' in line else 0.0
    return counts


def hits_row(counts: dict[str, float], replicas: int) -> Row:
    return Row("serve_cache_hits", "of prompt tokens", [counts["cached"] / counts["prompt"]], counts | {"replicas": replicas})
