"""One thread runs the refinement strategies of many prompts on one engine, without a barrier between rounds.

A finished response goes to its strategy at once, and the next asks of the strategy are queued at once. There is no asyncio, and
the same input gives the same schedule.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evolve_ray.errors import UserError
from evolve_ray.generate.scorer_requests import ScorerRequests
from evolve_ray.generate.spec import Completion, Engine
from evolve_ray.refine.asks import Ask, Draft, Given, Judge, Skip, Strategy, Verify
from evolve_ray.store import rows


@dataclass
class Chain:
    """The running strategy of one prompt."""

    prompt: dict
    strategy: Strategy
    num_pending: int = 0  # responses that the strategy still waits for
    expects_list: bool = False  # whether it yielded a list of asks, so that it receives a list
    answers: list[Draft | None] = field(default_factory=list)  # to its present asks, in their order
    rows: list[dict] = field(default_factory=list)  # all its drafts so far
    problem: str = ""  # why the prompt is rejected


class Drive:
    """Runs one strategy per prompt on one engine.

    The engine never has more than `engine.max_num_seqs` requests. Queued requests are submitted by round, the earliest round
    first. So no prompt falls behind the others, and at the end, when the queue is empty, little work is left.
    """

    def __init__(self, engine: Engine, encode: Callable[[Ask], list[int]], spec: Any, scorer: ScorerRequests | None = None):
        """`encode` turns an ask into token ids; `scorer` serves strategies that ask for scores."""
        self.engine, self.encode, self.spec, self.scorer = engine, encode, spec, scorer
        self.beat: Callable[[], None] = lambda: None  # called after every finished response
        self.verify: Callable[[dict, str], float] | None = None  # the verifier's value of (prompt, response)
        self.read: Callable[[Completion], dict] = lambda completion: {}  # what a row says of a response beside its text
        self.pending: dict[str, tuple[Chain, Ask, int, int]] = {}  # by request id: chain, ask, position of the ask, seed
        self.queue: list[tuple[int, int, str, list[int], int]] = []  # a heap: round, arrival, request id, prompt ids, seed
        self.arrivals, self.num_submitted = itertools.count(), 0
        self.waiting_for_scores: dict[int, Chain] = {}
        names = ("num_asks", "num_answers", "num_steps", "num_judged", "num_prompt_tokens", "num_cached_tokens", "num_tokens")
        self.stats = dict.fromkeys(names, 0)

    def run(self, prompts: list[dict], start: Callable[[str], Strategy]) -> tuple[list[dict], list[dict], dict]:
        """Runs `start(prompt)` for each prompt; returns (generation rows in canonical order, rejected rows, counts)."""
        chains = [Chain(prompt, start(prompt["prompt"])) for prompt in prompts]
        for chain in chains:
            self.advance(chain, None)
        while self.pending or self.waiting_for_scores:
            if self.pending:
                self.submit_queued()
                self.stats["num_steps"] += 1
                for completion in self.engine.step():
                    self.receive(completion)
            if self.waiting_for_scores:
                assert self.scorer is not None
                for key, scores in self.scorer.finished(wait=not self.pending):
                    self.advance(self.waiting_for_scores.pop(key), scores)
        generated = [row for chain in chains if not chain.problem for row in sorted(chain.rows, key=canonical_order)]
        rejected = [rows.reject(chain.prompt, "generations", chain.problem) for chain in chains if chain.problem]
        self.stats["num_answers"] = sum(row["kind"] == "answer" for row in generated)
        return generated, rejected, self.stats

    def advance(self, chain: Chain, value: Any) -> None:
        """Sends a strategy what it waits for, and starts its next request."""
        spec = self.spec
        try:
            request = chain.strategy.send(value)
        except StopIteration:
            return
        if isinstance(request, Given):
            row = given_row(chain.prompt, spec)
            chain.rows.append(row)
            self.advance(chain, Draft(row["draft_id"], row["text"], 0, 1, None, row["finish_reason"]))
            return
        if isinstance(request, Verify):
            if self.verify is None:
                raise UserError(
                    f"strategy.name: {spec.strategy.name!r} asks the verifier, but there is none; "
                    "set strategy.stop_right and add a [verifier] table"
                )
            self.advance(chain, self.verify(chain.prompt, request.draft.text))
            return
        if isinstance(request, Skip):
            self.skip(chain, request)
            self.advance(chain, None)
            return
        if isinstance(request, Judge):
            if self.scorer is None:
                raise UserError(
                    f"strategy.name: {spec.strategy.name!r} asks for scores, but there is no scorer; use another strategy"
                )
            key = self.stats["num_judged"]
            self.stats["num_judged"] += 1
            self.waiting_for_scores[key] = chain
            self.scorer.ask(key, chain.prompt, [draft.text for draft in request.drafts])
            return
        chain.expects_list = isinstance(request, list)
        asks = request if isinstance(request, list) else [request]
        encoded = [self.encode(ask) for ask in asks]
        for ask, ids in zip(asks, encoded, strict=True):
            if len(ids) + spec.sampling.max_tokens > spec.context_tokens:
                chain.problem = (
                    f"ask of round {ask.round} has {len(ids)} tokens; with sampling.max_tokens "
                    f"{spec.sampling.max_tokens} that is beyond model.context_tokens {spec.context_tokens}"
                )
                chain.strategy.close()
                return
        chain.num_pending, chain.answers = len(asks), [None] * len(asks)
        for position, (ask, ids) in enumerate(zip(asks, encoded, strict=True)):
            prompt_id = chain.prompt["prompt_id"]
            kind = () if ask.kind == "answer" else (ask.kind,)
            seed = rows.derive_seed(spec.seed, spec.scope, prompt_id, ask.sample, ask.round, *kind)
            request_id = "/".join(map(str, (prompt_id, ask.sample, ask.round, *kind, position)))
            self.pending[request_id] = (chain, ask, position, seed)
            heapq.heappush(self.queue, (ask.round, next(self.arrivals), request_id, ids, seed))

    def submit_queued(self) -> None:
        """Submits queued requests up to `engine.max_num_seqs`."""
        while self.queue and self.num_submitted < self.spec.engine.max_num_seqs:
            _, _, request_id, ids, seed = heapq.heappop(self.queue)
            self.engine.submit(request_id, ids, seed)
            self.num_submitted += 1

    def skip(self, chain: Chain, request: Skip) -> None:
        """Adds a row for each skipped round. A skipped round saves about as many tokens as its draft has."""
        last_row = next(row for row in chain.rows if row["draft_id"] == request.draft.draft_id)
        chain.rows += [skipped_row(last_row, number, request.reason) for number in request.rounds]
        for name, amount in (("num_skipped", 1), ("num_saved_tokens", last_row["num_tokens"])):
            self.stats[name] = self.stats.get(name, 0) + amount * len(request.rounds)

    def receive(self, completion: Completion) -> None:
        """Turns a finished response into a row and a draft; the strategy continues when all its responses are there."""
        self.beat()
        self.num_submitted -= 1
        chain, ask, position, seed = self.pending.pop(completion.request_id)
        details = self.read(completion)
        completion = dataclasses.replace(completion, text=details.pop("text", completion.text))
        row = draft_row(completion, chain.prompt, ask, seed, self.spec.model_hash) | details
        for name in ("num_prompt_tokens", "num_cached_tokens", "num_tokens"):
            self.stats[name] += getattr(completion, name)
        self.stats["num_asks"] += 1
        chain.rows.append(row)
        chain.answers[position] = Draft(row["draft_id"], row["text"], ask.sample, ask.round, ask.parent_id, row["finish_reason"])
        chain.num_pending -= 1
        if chain.num_pending == 0:
            self.advance(chain, list(chain.answers) if chain.expects_list else chain.answers[0])


def canonical_order(row: dict) -> tuple[int, int, bool]:
    """Sort key of a prompt's rows: sample, then round; a critique stands before the answer of its round."""
    return row["sample"], row["round"], row["kind"] == "answer"


def draft_row(completion: Completion, prompt: dict, ask: Ask, seed: int | None, model_hash: str | None) -> dict:
    """The generation row of a response; without a seed and a model hash for a draft that no model wrote."""
    position = (prompt["prompt_id"], ask.sample, ask.round, ask.kind)
    return {
        "draft_id": rows.content_id("draft", model_hash, *position, completion.text),
        "prompt_id": prompt["prompt_id"],
        "split": prompt["split"],
        "sample": ask.sample,
        "round": ask.round,
        "kind": ask.kind,
        "parent_id": ask.parent_id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_tokens": completion.num_tokens,
        "seed": seed,
        "model": model_hash,
    }


def skipped_row(last_row: dict, number: int, reason: str) -> dict:
    """The row of round `number`, which a chain skipped after the draft of `last_row`: no text, no model, no tokens."""
    return {name: value for name, value in last_row.items() if name not in rows.DRAFT_DETAILS.names} | {
        "draft_id": rows.content_id("skipped", last_row["draft_id"], number),
        "round": number,
        "kind": "skipped",
        "parent_id": last_row["draft_id"],
        "text": "",
        "finish_reason": reason,
        "num_prompt_tokens": 0,
        "num_tokens": 0,
        "seed": None,
        "model": None,
    }


def given_row(prompt: dict, spec: Any) -> dict:
    """The row of a draft that comes with its prompt: it has no model, no seed and no tokens."""
    if prompt.get("draft") is None:
        raise UserError(
            f"strategy.name: {spec.strategy.name!r} refines the drafts of its prompts, but {spec.prompts} has no column 'draft'; "
            "add the column or use another strategy"
        )
    completion = Completion("", prompt["draft"], 0, 0, 0, "stop")
    return draft_row(completion, prompt, Ask((), 0, 1), None, None)
