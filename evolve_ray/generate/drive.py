"""One thread drives many refinement strategies on one engine, without a barrier between rounds.

Every finished response goes to its strategy at once, and what that asks for next is submitted at once. No asyncio, and the
same input gives the same schedule.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evolve_ray.errors import UserError
from evolve_ray.generate.scorer_requests import Judging
from evolve_ray.generate.spec import Completion, Engine
from evolve_ray.refine.asks import Ask, Draft, Given, Judge, Skip, Strategy, Verify
from evolve_ray.store import rows


@dataclass
class Chain:
    """One prompt's strategy in flight: the drafts it waits for, in the order of its asks."""

    prompt: dict
    strategy: Strategy
    waiting: int = 0
    many: bool = False
    answers: list[Draft | None] = field(default_factory=list)
    drafts: list[dict] = field(default_factory=list)
    problem: str = ""


class Drive:
    """One strategy per prompt on one engine: every finished response goes to its strategy at once, no round waits.

    The engine has no more requests than seats. Who waits for one is admitted by round, earliest first: no chain falls behind the
    others, so that at the end, when there are seats for all, those that are left have the least to do.
    """

    def __init__(self, engine: Engine, encode: Callable[[Ask], list[int]], spec: Any, judge: Judging | None = None):
        """`encode` turns an ask into token ids; `judge` is there for strategies that ask the scorer."""
        self.engine, self.encode, self.spec, self.judge = engine, encode, spec, judge
        self.beat: Callable[[], None] = lambda: None  # called with every finished response
        self.verify: Callable[[dict, str], float] | None = None  # what the verifier says of a prompt's response
        self.live: dict[str, tuple[Chain, Ask, int, int]] = {}
        self.queue: list[tuple[int, int, str, list[int], int]] = []  # a heap: round, arrival, request id, prompt ids, seed
        self.arrivals, self.num_seated = itertools.count(), 0
        self.judged: dict[int, Chain] = {}
        names = ("num_asks", "num_answers", "num_steps", "num_judged", "num_prompt_tokens", "num_cached_tokens", "num_tokens")
        self.stats = dict.fromkeys(names, 0)

    def run(self, prompts: list[dict], start: Callable[[str], Strategy]) -> tuple[list[dict], list[dict], dict]:
        """(generation rows in canonical order, rejected prompts, counts)."""
        chains = [Chain(prompt, start(prompt["prompt"])) for prompt in prompts]
        for chain in chains:
            self.advance(chain, None)
        while self.live or self.judged:
            if self.live:
                self.admit()
                self.stats["num_steps"] += 1
                for completion in self.engine.step():
                    self.take(completion)
            if self.judged:
                assert self.judge is not None
                for key, scores in self.judge.finished(wait=not self.live):
                    self.advance(self.judged.pop(key), scores)
        generated = [row for chain in chains if not chain.problem for row in sorted(chain.drafts, key=canonical_order)]
        rejected = [rows.reject(chain.prompt, "generations", chain.problem) for chain in chains if chain.problem]
        self.stats["num_answers"] = sum(row["kind"] == "answer" for row in generated)
        return generated, rejected, self.stats

    def advance(self, chain: Chain, value: Any) -> None:
        """Hands a strategy what it waits for, and starts what it asks for next."""
        spec = self.spec
        try:
            asks = chain.strategy.send(value)
        except StopIteration:
            return
        if isinstance(asks, Given):
            row = given_row(chain.prompt, spec)
            chain.drafts.append(row)
            self.advance(chain, Draft(row["draft_id"], row["text"], 0, 1, None, row["finish_reason"]))
            return
        if isinstance(asks, Verify):
            if self.verify is None:
                raise UserError(f"strategy.name: {spec.strategy.name!r} asks the verifier, but none is at hand here")
            self.advance(chain, self.verify(chain.prompt, asks.draft.text))
            return
        if isinstance(asks, Skip):
            self.skip(chain, asks)
            self.advance(chain, None)
            return
        if isinstance(asks, Judge):
            if self.judge is None:
                raise UserError(f"strategy.name: {spec.strategy.name!r} asks for scores, but no scorer is at hand here")
            key = self.stats["num_judged"]
            self.stats["num_judged"] += 1
            self.judged[key] = chain
            self.judge.ask(key, chain.prompt, [draft.text for draft in asks.drafts])
            return
        chain.many = isinstance(asks, list)
        batch = asks if isinstance(asks, list) else [asks]
        encoded = [self.encode(ask) for ask in batch]
        for ask, ids in zip(batch, encoded, strict=True):
            if len(ids) + spec.sampling.max_tokens > spec.context_tokens:
                chain.problem = (
                    f"ask of round {ask.round} has {len(ids)} tokens; with sampling.max_tokens "
                    f"{spec.sampling.max_tokens} that is beyond model.context_tokens {spec.context_tokens}"
                )
                chain.strategy.close()
                return
        chain.waiting, chain.answers = len(batch), [None] * len(batch)
        for position, (ask, ids) in enumerate(zip(batch, encoded, strict=True)):
            prompt_id = chain.prompt["prompt_id"]
            kind = () if ask.kind == "answer" else (ask.kind,)
            seed = rows.derive_seed(spec.seed, spec.scope, prompt_id, ask.sample, ask.round, *kind)
            request_id = "/".join(map(str, (prompt_id, ask.sample, ask.round, *kind, position)))
            self.live[request_id] = (chain, ask, position, seed)
            heapq.heappush(self.queue, (ask.round, next(self.arrivals), request_id, ids, seed))

    def admit(self) -> None:
        """Gives the free seats of the engine to those who wait."""
        while self.queue and self.num_seated < self.spec.engine.max_num_seqs:
            _, _, request_id, ids, seed = heapq.heappop(self.queue)
            self.engine.submit(request_id, ids, seed)
            self.num_seated += 1

    def skip(self, chain: Chain, left_out: Skip) -> None:
        """A row for each round that is left out. It saves about the tokens of the draft that it would have refined."""
        refined = next(row for row in chain.drafts if row["draft_id"] == left_out.draft.draft_id)
        chain.drafts += [skipped_row(refined, number, left_out.reason) for number in left_out.rounds]
        for name, number in (("num_skipped", 1), ("num_saved_tokens", refined["num_tokens"])):
            self.stats[name] = self.stats.get(name, 0) + number * len(left_out.rounds)

    def take(self, completion: Completion) -> None:
        """A finished response becomes a row, and a draft for its strategy."""
        self.beat()
        self.num_seated -= 1
        chain, ask, position, seed = self.live.pop(completion.request_id)
        row = draft_row(completion, chain.prompt, ask, seed, self.spec.model_hash)
        for name in ("num_prompt_tokens", "num_cached_tokens", "num_tokens"):
            self.stats[name] += getattr(completion, name)
        self.stats["num_asks"] += 1
        chain.drafts.append(row)
        chain.answers[position] = Draft(row["draft_id"], row["text"], ask.sample, ask.round, ask.parent_id, row["finish_reason"])
        chain.waiting -= 1
        if chain.waiting == 0:
            self.advance(chain, list(chain.answers) if chain.many else chain.answers[0])


def canonical_order(row: dict) -> tuple[int, int, bool]:
    """By sample, then round; a critique stands before the draft that it leads to."""
    return row["sample"], row["round"], row["kind"] == "answer"


def draft_row(completion: Completion, prompt: dict, ask: Ask, seed: int | None, model_hash: str | None) -> dict:
    place = (prompt["prompt_id"], ask.sample, ask.round, ask.kind)
    return {
        "draft_id": rows.content_id("draft", model_hash, *place, completion.text),
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


def skipped_row(refined: dict, number: int, reason: str) -> dict:
    """The row of a round that a chain left out after the draft `refined`: written by nobody, at no cost."""
    return refined | {
        "draft_id": rows.content_id("skipped", refined["draft_id"], number),
        "round": number,
        "kind": "skipped",
        "parent_id": refined["draft_id"],
        "text": "",
        "finish_reason": reason,
        "num_prompt_tokens": 0,
        "num_tokens": 0,
        "seed": None,
        "model": None,
    }


def given_row(prompt: dict, spec: Any) -> dict:
    """The row of a draft that came with its prompt: of no model and no seed, and it costs no tokens."""
    if prompt.get("draft") is None:
        raise UserError(f"strategy.name: {spec.strategy.name!r} refines given drafts, but {spec.prompts} has no column 'draft'")
    completion = Completion("", prompt["draft"], 0, 0, 0, "stop")
    return draft_row(completion, prompt, Ask((), 0, 1), None, None)
