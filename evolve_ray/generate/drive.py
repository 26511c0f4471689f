"""One thread runs the refinement strategies of many prompts on one engine, without a barrier between rounds.

A finished response goes to its strategy at once, and the next asks of the strategy are queued at once. There is no asyncio, and
the same input gives the same schedule.
"""

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evolve_ray.config.plugs import blame, is_own, short
from evolve_ray.errors import UserError
from evolve_ray.generate.draft_rows import (
    as_read,
    draft_of,
    draft_row,
    given_row,
    in_order,
    mark_returned,
    row_of_prompt,
    skipped_row,
)
from evolve_ray.generate.requests import check_request, line_of
from evolve_ray.generate.scorer_requests import ScorerRequests
from evolve_ray.generate.second import Answer, SecondModel
from evolve_ray.generate.spec import Completion, Engine
from evolve_ray.refine.asked import stores_messages
from evolve_ray.refine.asks import Ask, Draft, Given, Judge, LogProb, Made, Score, Skip, Strategy, Verdict, Verify
from evolve_ray.refine.named_models import unknown_model
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
    num_asked: Counter[tuple[int, int, str]] = field(default_factory=Counter)  # asks by sample, round and kind
    order: dict[str, int] = field(default_factory=dict)  # by draft id: the number of its ask in this chain


@dataclass(frozen=True)
class Place:
    """The place of an ask: in its list, in its chain, and among the asks of its sample, round and kind; with its seed."""

    position: int
    seed: int
    number: int
    again: tuple[int, ...]


DONE, LATER = object(), object()
TOKENS = ("num_prompt_tokens", "num_cached_tokens", "num_tokens")
BRIEFLY = 0.005  # seconds between two looks where several kinds of answers are waited for
READ = {"max_tokens": 1, "prompt_logprobs": 0}  # the sampling of a text whose log-probability is asked


class Drive:
    """Runs one strategy per prompt on one engine.

    The engine never has more than `engine.max_num_seqs` requests. Queued requests are submitted by round, the earliest round
    first. So no prompt falls behind the others, and at the end, when the queue is empty, little work is left.
    """

    def __init__(self, engine: Engine, encode: Callable[[Ask], list[int]], spec: Any, scorer: ScorerRequests | None = None):
        """`encode` turns an ask into token ids; `scorer` serves strategies that ask for scores."""
        self.engine, self.encode, self.spec, self.scorer = engine, encode, spec, scorer
        self.beat: Callable[[], None] = lambda: None  # called after every finished response
        # The token ids of a response, with its end token if it is finished; for prefixes and given texts.
        self.response_ids: Callable[[str, bool], list[int]] = lambda text, finished: []
        self.gives_row = False  # whether the strategy takes the prompt's row
        self.verify: Callable[[dict, str], float] | None = None  # the verifier's value of (prompt, response)
        self.read: Callable[[Completion], dict] = lambda completion: {}  # what a row says of a response beside its text
        self.models: dict[str, SecondModel] = {}  # by name
        self.pending: dict[str, tuple[Chain, Ask, Place]] = {}  # by request id
        self.elsewhere: dict[str, tuple[Chain, Ask, Place]] = {}  # by request id: asks to second models
        self.queue: list[tuple[int, int, str, list[int], int]] = []  # a heap: round, arrival, request id, prompt ids, seed
        self.reading: dict[str, tuple[Chain, int]] = {}  # by request id: texts whose log-probability is asked; context tokens
        self.arrivals, self.num_submitted = itertools.count(), 0
        self.waiting_for_scores: dict[int, Chain] = {}
        self.stats = dict.fromkeys(("num_asks", "num_answers", "num_steps", "num_judged", *TOKENS), 0)

    def run(self, prompts: list[dict], start: Callable[..., Strategy]) -> tuple[list[dict], list[dict], dict]:
        """Runs `start(prompt)` for each prompt; returns (generation rows in canonical order, rejected rows, counts)."""
        chains = [Chain(prompt, self.start(prompt, start)) for prompt in prompts]
        for chain in chains:
            self.advance(chain, None)
        while self.pending or self.reading or self.waiting_for_scores or self.elsewhere:
            if self.pending or self.reading:
                self.submit_queued()
                self.stats["num_steps"] += 1
                for completion in self.engine.step():
                    self.receive(completion)
            self.receive_others()
        generated = [row for chain in chains if not chain.problem for row in in_order(chain.rows, chain.order)]
        rejected = [rows.reject(chain.prompt, "generations", chain.problem) for chain in chains if chain.problem]
        self.stats["num_answers"] = sum(row["kind"] == "answer" for row in generated)
        return generated, rejected, self.stats

    def receive_others(self) -> None:
        """Goes on where scores or answers of second models have come; waits for one if the engine has nothing to do."""
        asked = {ask.model for _, ask, _ in self.elsewhere.values()}
        idle, kinds = not self.pending and not self.reading, len(asked) + bool(self.waiting_for_scores)
        if self.waiting_for_scores:
            assert self.scorer is not None
            for key, scores in self.scorer.finished(wait=idle and kinds == 1):
                self.advance(self.waiting_for_scores.pop(key), scores)
        for name in sorted(asked):
            for request_id, answer in self.models[name].finished(wait=idle and kinds == 1):
                self.receive_answer(request_id, answer)
        if idle and kinds > 1:
            time.sleep(BRIEFLY)

    def start(self, prompt: dict, start: Callable[..., Strategy]) -> Strategy:
        """The strategy of a prompt. Raises UserError if it is no generator."""
        name = self.spec.strategy.name
        with blame("strategy.name", name, f"prompt {prompt['prompt_id']}"):
            strategy = start(prompt["prompt"], **({"row": row_of_prompt(prompt)} if self.gives_row else {}))
        if not hasattr(strategy, "send"):
            raise UserError(f"strategy.name: {name!r} returned {short(repr(strategy))}, but must be a generator that yields asks")
        return strategy

    def next_request(self, chain: Chain, value: Any) -> Any:
        """What a strategy yields when it gets `value`; `DONE` when it has returned. Raises UserError if it is no request."""
        name, prompt_id = self.spec.strategy.name, chain.prompt["prompt_id"]
        with blame("strategy.name", name, f"prompt {prompt_id}"):
            try:
                request = chain.strategy.send(value)
            except StopIteration as end:
                if is_own(name):
                    mark_returned(chain.rows, end.value)
                return DONE
        check_request(name, prompt_id, chain.strategy, request)
        return request

    def advance(self, chain: Chain, value: Any) -> None:
        """Sends a strategy what it waits for, and starts its next request."""
        spec = self.spec
        request = self.next_request(chain, value)
        while (value := self.at_once(chain, request)) is not LATER:
            request = self.next_request(chain, value)
        if request is DONE:
            if not chain.rows:
                chain.problem = f"strategy {spec.strategy.name} returned without a draft"
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
        if isinstance(request, LogProb):
            self.ask_logprob(chain, request)
            return
        chain.expects_list = isinstance(request, list)
        asks = request if isinstance(request, list) else [request]
        for ask in asks:
            self.check_model(chain, ask)
        encoded = [[] if ask.model else self.encode(ask) + self.prefix_ids(ask) for ask in asks]
        for ask, ids in zip(asks, encoded, strict=True):
            if problem := too_long(ask, len(ids), spec):
                self.give_up(chain, problem)
                return
        chain.num_pending, chain.answers = len(asks), [None] * len(asks)
        for position, (ask, ids) in enumerate(zip(asks, encoded, strict=True)):
            prompt_id = chain.prompt["prompt_id"]
            kind = () if ask.kind == "answer" else (ask.kind,)
            place = (ask.sample, ask.round, ask.kind)
            # Asks of one place are numbered from the second one on, so that each has a seed and an id of its own.
            again = (chain.num_asked[place],) if chain.num_asked[place] else ()
            chain.num_asked[place] += 1
            number = chain.num_asked.total()
            seed = rows.derive_seed(spec.seed, spec.scope, prompt_id, ask.sample, ask.round, *kind, *again)
            request_id = "/".join(map(str, (prompt_id, ask.sample, ask.round, *kind, *again, position)))
            asked = (chain, ask, Place(position, seed, number, again))
            if ask.model:
                self.elsewhere[request_id] = asked
                self.models[ask.model].ask(request_id, ask, seed)
            else:
                self.pending[request_id] = asked
                heapq.heappush(self.queue, (ask.round, next(self.arrivals), request_id, ids, seed))

    def give_up(self, chain: Chain, problem: str) -> None:
        """Rejects the prompt of a chain."""
        chain.problem = problem
        chain.strategy.close()

    def check_model(self, chain: Chain, ask: Ask) -> None:
        """Raises UserError if an ask names a model that the recipe does not have."""
        if unknown := unknown_model(ask.model, self.models):
            name, prompt_id = self.spec.strategy.name, chain.prompt["prompt_id"]
            raise UserError(f"strategy.name: {name!r}, prompt {prompt_id}: {unknown}{line_of(chain.strategy)}")

    def ask_logprob(self, chain: Chain, request: LogProb) -> None:
        """Queues a text whose log-probability a strategy asks for."""
        context = self.encode(Ask(request.messages, 0, 1))
        ids = [*context, *self.response_ids(request.text, request.finished)]
        if len(ids) >= self.spec.context_tokens:
            self.give_up(chain, f"a LogProb has {len(ids)} tokens; model.context_tokens is {self.spec.context_tokens}")
            return
        arrival = next(self.arrivals)
        request_id = f"{chain.prompt['prompt_id']}/logprob/{arrival}"
        self.reading[request_id] = (chain, len(context))
        heapq.heappush(self.queue, (0, arrival, request_id, ids, 0))

    def receive_logprob(self, completion: Completion) -> None:
        """The strategy continues with the log-probability of its text."""
        chain, num_context = self.reading.pop(completion.request_id)
        if not completion.prompt_logps:
            name = self.spec.engine.name
            raise UserError(f"engine.name: {name!r} gives no log-probabilities of a text, which the strategy asks for; use vllm")
        self.stats["num_read_tokens"] = self.stats.get("num_read_tokens", 0) + completion.num_prompt_tokens
        self.advance(chain, float(sum(completion.prompt_logps[num_context - 1 :])))

    def at_once(self, chain: Chain, request: Any) -> Any:
        """The answer to a request that needs neither engine nor scorer; LATER for any other."""
        if request == []:
            return []
        if isinstance(request, Given):
            row = given_row(chain.prompt, self.spec)
            chain.rows.append(row)
            return draft_of(row)
        if isinstance(request, Verify):
            if self.verify is None:
                raise UserError(
                    f"strategy.name: {self.spec.strategy.name!r} asks the verifier, but there is none; add a [verifier] table"
                )
            value = self.verify(chain.prompt, request.draft.text)
            return value if isinstance(value, Verdict) else Verdict(value)
        if isinstance(request, Skip):
            return self.skip(chain, request)
        if isinstance(request, Score):
            self.row_of(chain, request.draft)["strategy_score"] = float(request.value)
            return None
        if isinstance(request, Made):
            row = self.made_row(chain, request)
            chain.rows.append(row)
            return draft_of(row)
        return LATER

    def submit_queued(self) -> None:
        """Submits queued requests up to `engine.max_num_seqs`."""
        while self.queue and self.num_submitted < self.spec.engine.max_num_seqs:
            _, _, request_id, ids, seed = heapq.heappop(self.queue)
            sampling = READ if request_id in self.reading else self.pending[request_id][1].sampling
            own: dict[str, Any] = {"sampling": sampling} if sampling else {}
            own |= {"logps": True} if self.spec.sampling.logps and request_id not in self.reading else {}
            self.engine.submit(request_id, ids, seed, **own)
            self.num_submitted += 1

    def skip(self, chain: Chain, request: Skip) -> None:
        """Adds a row for each skipped round. A skipped round saves about as many tokens as its draft has."""
        last_row = self.row_of(chain, request.draft)
        chain.rows += [skipped_row(last_row, number, request.reason) for number in request.rounds]
        for name, amount in (("num_skipped", 1), ("num_saved_tokens", last_row["num_tokens"])):
            self.stats[name] = self.stats.get(name, 0) + amount * len(request.rounds)

    def row_of(self, chain: Chain, draft: Draft) -> dict:
        """The row of a draft that the engine wrote for this prompt, or that came with it."""
        for row in chain.rows:
            if row["draft_id"] == draft.draft_id:
                return row
        raise UserError(
            f"strategy.name: {self.spec.strategy.name!r}, prompt {chain.prompt['prompt_id']}: names draft {draft.draft_id!r}, "
            "which is no draft of this prompt; hand in a text of your own with Made"
        )

    def made_row(self, chain: Chain, request: Made) -> dict:
        """The row of a draft that the strategy composed: no model wrote it as a whole."""
        ask = Ask((), request.sample, request.round, request.parent_id, request.kind)
        place = (request.sample, request.round, request.kind)
        again = (chain.num_asked[place],) if chain.num_asked[place] else ()
        chain.num_asked[place] += 1
        parts = [self.row_of(chain, part)["draft_id"] for part in request.parts]
        row = draft_row(Completion("", request.text, 0, 0, 0, "stop"), chain.prompt, ask, None, None, again)
        chain.order[row["draft_id"]] = chain.num_asked.total()
        self.stats["num_made"] = self.stats.get("num_made", 0) + 1
        return row | ({"parts": parts} if parts else {})

    def prefix_ids(self, ask: Ask) -> list[int]:
        """The tokens of what the model continues."""
        return self.response_ids(ask.prefix, False) if ask.prefix else []

    def receive(self, completion: Completion) -> None:
        """Turns a finished response into a row and a draft; the strategy continues when all its responses are there."""
        self.beat()
        self.num_submitted -= 1
        if completion.request_id in self.reading:
            self.receive_logprob(completion)
            return
        chain, ask, place = self.pending.pop(completion.request_id)
        completion, details = as_read(completion, ask, self.prefix_ids(ask), self.read)
        self.take(chain, ask, place, completion, details, self.spec.model_hash)

    def receive_answer(self, request_id: str, answer: Answer) -> None:
        """Takes the response of a second model."""
        self.beat()
        chain, ask, place = self.elsewhere.pop(request_id)
        if answer.completion is None:
            self.give_up(chain, answer.problem)
        else:
            self.take(chain, ask, place, answer.completion, answer.details, self.models[ask.model].model_hash)

    def take(self, chain: Chain, ask: Ask, place: Place, completion: Completion, details: dict, model_hash: str) -> None:
        """Adds the row of a response to its chain, whose strategy continues when all its responses are there."""
        row = draft_row(completion, chain.prompt, ask, place.seed, model_hash, place.again) | details
        if stores_messages(self.spec.strategy):
            row["messages"] = list(ask.messages)
        chain.order[row["draft_id"]] = place.number
        counts = {"num_asks": 1} | {name: getattr(completion, name) for name in TOKENS}
        for name, count in counts.items():
            self.stats[name] += count
            if ask.model:
                of_model = f"{name}_of_{ask.model}"
                self.stats[of_model] = self.stats.get(of_model, 0) + count
        chain.rows.append(row)
        chain.answers[place.position] = draft_of(row, completion.stopped_at)
        chain.num_pending -= 1
        if chain.num_pending == 0 and not chain.problem:
            self.advance(chain, list(chain.answers) if chain.expects_list else chain.answers[0])


def too_long(ask: Ask, num_tokens: int, spec: Any) -> str:
    """Why an ask of so many tokens has no room for its response; "" if it has."""
    max_tokens = ask.max_tokens or spec.sampling.max_tokens
    if num_tokens + max_tokens <= spec.context_tokens:
        return ""
    return (
        f"ask of round {ask.round} has {num_tokens} tokens; with {'its ' if ask.max_tokens else 'sampling.'}max_tokens "
        f"{max_tokens} that is beyond {spec.table}.context_tokens {spec.context_tokens}"
    )
