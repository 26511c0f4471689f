"""The generating actors: each owns one engine, writes shards of drafts, and loads new weights in place."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from evolve_ray.config import options
from evolve_ray.config.plugs import find_plug, takes, with_args
from evolve_ray.generate.draft_rows import as_read
from evolve_ray.generate.drive import Drive, too_long
from evolve_ray.generate.second import Answer
from evolve_ray.generate.spec import Completion, Engine, GenerateSpec
from evolve_ray.generate.vllm import ENGINE_ENV, VllmEngine
from evolve_ray.models.chat import Chat
from evolve_ray.models.thinking import NO_ANSWER
from evolve_ray.pools.actors import PoolOptions
from evolve_ray.pools.worker import ShardWorker
from evolve_ray.refine.asks import Ask, Strategy
from evolve_ray.refine.strategies import ALL_STRATEGIES
from evolve_ray.score.protocol import call_scorer
from evolve_ray.score.verifiers import build_verifier
from evolve_ray.store import rows

VERSION = 2
ENGINES: dict[str, Callable[[GenerateSpec, Chat], Engine]] = {"vllm": VllmEngine}


class Generator(ShardWorker):
    """Owns one engine and generates one shard of drafts per call."""

    schema = rows.GENERATION
    details = rows.DRAFT_DETAILS
    stage = "generations"

    def __init__(self, spec: GenerateSpec):
        super().__init__(spec)
        started = time.monotonic()
        self.chat = Chat(spec.model, rendering=spec.template.rendering)
        self.engine = find_plug(ENGINES, spec.engine.name, "engine.name")(spec, self.chat)
        self.verifier = build_verifier(spec.verifier) if spec.verifier else None
        self.start_seconds = time.monotonic() - started

    def renew(self, spec: GenerateSpec) -> None:
        started = time.monotonic()
        self.chat = Chat(spec.model, rendering=spec.template.rendering)
        if spec.model_hash != self.spec.model_hash:
            self.engine.reload(spec, self.chat)
        else:
            self.engine.use(spec, self.chat)
        if spec.verifier != self.spec.verifier:
            self.verifier = build_verifier(spec.verifier) if spec.verifier else None
        self.spec = spec
        self.start_seconds += time.monotonic() - started

    def process(self, shard: int, prompts: list[dict]) -> tuple[list[dict], list[dict], dict]:
        started = time.monotonic()
        spec = self.spec
        strategy = find_plug(ALL_STRATEGIES, spec.strategy.name, "strategy.name")
        strategy = with_args("strategy.args", spec.strategy.name, strategy, spec.strategy.args)

        def start(prompt: str, **row: dict) -> Strategy:
            return strategy(prompt, spec.template, spec.strategy, **row)

        drive = Drive(self.engine, self.encode, spec, spec.remote_scorer.open() if spec.remote_scorer else None)
        drive.models = {name: model.open() for name, model in spec.models.items()}
        drive.beat = self.beat
        drive.response_ids = lambda text, finished: self.chat.response_ids(text, finished=finished)
        drive.gives_row = takes(strategy, "row")
        drive.read = self.read
        drive.verify = self.verify if spec.verifier else None
        with dead_engine_ends_actor():
            generated, rejected, stats = drive.run(prompts, start)
        stats |= {"num_in": len(prompts), "engine_seconds": round(time.monotonic() - started, 3)}
        stats |= self.engine.counts()
        stats |= {
            "start_seconds": round(self.start_seconds, 3),
            "num_cut": sum(row["finish_reason"] == "length" for row in generated),
        }
        stats |= count_details(generated)
        stats |= {f"engine_seconds_of_{name}": round(model.seconds, 3) for name, model in drive.models.items()}
        self.start_seconds = 0.0
        return generated, rejected, stats

    def answer(self, asks: list[tuple[str, Ask, int]]) -> tuple[list[tuple[str, Answer]], float]:
        """(request id, answer) for each (request id, ask, seed) of strategies that run beside another model; the seconds."""
        started = time.monotonic()
        answers: list[tuple[str, Answer]] = []
        waiting: list[tuple[str, Ask, int, list[int], int]] = []
        for request_id, ask, seed in asks:
            prefix = self.chat.response_ids(ask.prefix, finished=False) if ask.prefix else []
            ids = [*self.encode(ask), *prefix]
            if problem := too_long(ask, len(ids), self.spec):
                answers.append((request_id, Answer(None, problem=problem)))
            else:
                waiting.append((request_id, ask, seed, ids, len(prefix)))
        running: dict[str, tuple[Ask, list[int]]] = {}
        with dead_engine_ends_actor():
            while waiting or running:
                while waiting and len(running) < self.spec.engine.max_num_seqs:
                    request_id, ask, seed, ids, num_prefix = waiting.pop(0)
                    running[request_id] = (ask, ids[len(ids) - num_prefix :])
                    self.engine.submit(request_id, ids, seed, **({"sampling": ask.sampling} if ask.sampling else {}))
                for completion in self.engine.step():
                    ask, prefix = running.pop(completion.request_id)
                    answers.append((completion.request_id, Answer(*as_read(completion, ask, prefix, self.read))))
        return answers, time.monotonic() - started

    def verify(self, prompt: dict, text: str) -> float:
        assert self.verifier is not None
        assert self.spec.verifier is not None
        name = f"verifier {self.spec.verifier.name}"
        return call_scorer(name, self.verifier, [prompt["prompt"]], [prompt["answer"]], [text])[0]

    def read(self, completion: Completion) -> dict:
        """The answer in a response, and what its row says beside it; see `rows.DRAFT_DETAILS`."""
        ids = list(completion.token_ids)
        if not ids:  # an engine that shows text alone
            return {}
        parts = self.chat.parts(ids, completion.text)
        fault = self.chat.fault(ids, completion.text) or (NO_ANSWER if parts.answer is None else "")
        details: dict[str, Any] = {"text": parts.answer or ""}
        if parts.thinking is not None:
            details |= {"thinking": parts.thinking, "num_thinking_tokens": parts.num_thinking}
        if fault:
            details["fault"] = fault
        finished = completion.finish_reason == "stop"
        if parts.thinking is not None or fault or self.chat.response_ids(completion.text, finished=finished) != ids:
            details["token_ids"] = ids
        if self.spec.sampling.logps and len(completion.logps) == len(ids):  # a prefix was not sampled
            details["logps"] = list(completion.logps)
        return details

    def encode(self, ask: Ask) -> list[int]:
        return self.chat.context_ids(ask.messages)

    def probe(self, prompts: list[dict]) -> list[dict]:
        """Generates a chain of two rounds on each prompt; returns `{id, context, response, logps}`, sorted by id.

        `context` and `response` are token ids, `logps` the engine's log-probabilities of the response tokens, in nats. Round 2
        continues a draft that is in the prefix cache, so weights or cached states of an older model would change its `logps`.
        """
        spec, samples = self.spec, []
        requests: dict[str, tuple[list[int], str]] = {}  # by request id: context, response
        for round_number in (1, 2):
            for prompt in prompts:
                messages = spec.template.direct(prompt["prompt"])
                if round_number == 2:
                    messages = spec.template.refinement(prompt["prompt"], requests[f"{prompt['prompt_id']}/1"][1])
                request_id = f"{prompt['prompt_id']}/{round_number}"
                requests[request_id] = (self.chat.context_ids(messages), "")
                seed = rows.derive_seed("probe", spec.seed, prompt["prompt_id"], round_number)
                self.engine.submit(request_id, requests[request_id][0], seed, logps=True)
            num_pending = len(prompts)
            with dead_engine_ends_actor():
                while num_pending:
                    for completion in self.engine.step():
                        request_id, context = completion.request_id, requests[completion.request_id][0]
                        requests[request_id] = (context, self.read(completion).get("text", completion.text))
                        samples.append(
                            {"id": request_id, "context": context, "response": completion.token_ids, "logps": completion.logps}
                        )
                        num_pending -= 1
        return sorted(samples, key=lambda sample: sample["id"])


def count_details(generated: list[dict]) -> dict[str, int]:
    """Counts of what is beside the texts; those that are 0 are left out."""
    faults = [row["fault"] for row in generated if row.get("fault")]
    counts = {
        "num_thinking_tokens": sum(row.get("num_thinking_tokens") or 0 for row in generated),
        "num_without_answer": faults.count(NO_ANSWER),
        "num_broken": len(faults) - faults.count(NO_ANSWER),
        "num_own_tokens": sum(row.get("token_ids") is not None for row in generated),
    }
    return {name: count for name, count in counts.items() if count}


@contextlib.contextmanager
def dead_engine_ends_actor() -> Iterator[None]:
    """Ends the actor when its engine is dead, so that Ray restarts the actor and retries the shard."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "EngineDeadError":
            os._exit(1)
        raise


def engine_pool(engine: options.Engine, name: str = "engines") -> PoolOptions:
    """The pool of engines that the recipe asks for; of a second model under another name."""
    return PoolOptions(
        name=name,
        worker=Generator,
        actors=engine.actors,
        cpus=engine.cpus_per_actor,
        gpus=engine.gpus_per_actor,
        restarts=engine.max_restarts,
        stall_s=engine.stall_s,
        env=ENGINE_ENV | {name: str(value) for name, value in engine.env.items()},
    )
