"""Runs the strategy of one request: its rounds, when they end, and which draft is the answer.

It knows no HTTP and no vLLM. The engine and the scorer are behind two small protocols, so fakes that answer from a list test it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from evolve_ray.refine.asks import Ask, Draft, Judge, LogProb, Made, Messages, Score, Skip, Strategy, Verdict, Verify
from evolve_ray.refine.strategies import STRATEGIES
from evolve_ray.serve.errors import RequestError
from evolve_ray.serve.request import Refinement, is_sampled
from evolve_ray.store.rows import derive_seed

STOPPED = {  # every reason why rounds end
    "rounds": "all rounds are done",
    "unchanged": "a refinement was equal to its draft",
    "verified": "the verifier accepted a draft",
    "budget_tokens": "the tokens of the request are used up",
    "deadline": "the time of the request is over",
    "context": "the next round does not fit into the context of the model",
}


@dataclass(frozen=True)
class Piece:
    """A part of a response, as the engine wrote it. `output` is the engine's own object."""

    text: str
    num_tokens: int
    finish_reason: str | None
    num_cached_tokens: int
    output: Any
    token_ids: tuple[int, ...] = ()
    stopped_at: str = ""  # the stop string of the ask at which the response ended


class Engine(Protocol):
    """What the rounds need from an engine."""

    context_tokens: int
    max_tokens: int  # the longest response that the request allows

    async def encode(self, messages: Messages, *, first: bool, prefix: str = "") -> list[int]:
        """Token ids of an ask and its `prefix`. RequestError for the `first` if request and context do not fit together."""
        ...

    def write(self, ask: Ask, ids: list[int], seed: int | None, max_tokens: int) -> AsyncIterator[Piece]:
        """The response to an ask, in one piece or several. Closing the iterator aborts it in the engine."""
        ...

    def answer(self, text: str, token_ids: list[int]) -> str:
        """The answer in a response, without the thinking before it: what is refined, scored and compared, as in training."""
        ...


class Scorer(Protocol):
    """What the rounds need from a scorer and a verifier. `prompt` is the user's last turn, `answer` the known right answer."""

    async def score(self, prompt: str, answer: str | None, texts: list[str]) -> list[float | None]: ...

    async def verify(self, prompt: str, answer: str | None, text: str) -> float: ...

    async def needs_answer(self, part: str, prompt: str) -> bool:
        """Whether `part` ("scorer" or "verifier") has no value for a response to this prompt without the right answer."""
        ...

    async def groups(self, texts: list[str]) -> list[int]:
        """A number for each text; texts that give the same answer have the same number."""
        ...


@dataclass
class Round:
    """One request to the engine, and its response. `cut_by` says why it was ended before its own end; "" if it was not."""

    ask: Ask
    seed: int | None
    num_prompt_tokens: int
    max_tokens: int
    capped_by: str = ""  # what made `max_tokens` smaller than the request allows: "budget_tokens" or "context"
    is_live: bool = False  # streamed as the answer while it is written: it is the answer, whatever comes
    again: int = 0  # the number of earlier asks of its sample, round and kind
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    answer: str = ""  # the text without the thinking of the model; known when the round has ended
    finish_reason: str | None = None
    stopped_at: str = ""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    seconds: float = 0.0
    first_s: float | None = None  # until the first piece
    score: float | None = None
    cut_by: str = ""
    outputs: list[Any] = field(default_factory=list)
    draft: Draft | None = None

    @property
    def is_answer(self) -> bool:
        return self.ask.kind == "answer"


@dataclass(frozen=True)
class Event:
    """What happened: "wrote" (with a piece), "ended" or "scored"."""

    name: str
    round: Round
    piece: Piece | None = None


@dataclass(frozen=True)
class Outcome:
    """The end of a request: the round whose draft is the answer, all rounds in the order of their start, and why they ended."""

    chosen: Round
    rounds: list[Round]
    stopped: str
    seconds: float


class Stopped(Exception):
    """No further round; the argument is a key of `STOPPED`."""


@dataclass
class Rounds:
    """The rounds of one request. `earlier` are the turns before the last one of the user, which is `prompt`."""

    refinement: Refinement
    strategy: Strategy
    earlier: Messages
    prompt: str
    engine: Engine
    scorer: Scorer | None
    shows_scores: bool  # every draft is scored, for the client to see
    seed: int | None
    max_seconds: float
    stream: bool = False
    emit: Callable[[Event], None] = lambda event: None
    rounds: list[Round] = field(default_factory=list)
    scoring: dict[str, asyncio.Task] = field(default_factory=dict)  # by draft id
    places: Counter[tuple[int, int, str]] = field(default_factory=Counter)  # asks by sample, round and kind

    async def run(self) -> Outcome:
        """Runs all rounds. Cancelling it cancels what runs in the engine, and no further round starts."""
        started = time.monotonic()
        seconds = min(self.max_seconds, self.refinement.deadline_s or self.max_seconds)
        try:
            async with asyncio.timeout(seconds):
                stopped = await self.drive()
        except TimeoutError:
            stopped = "deadline"
        finally:
            self.strategy.close()
        try:
            chosen = await self.choose()
            if self.shows_scores:
                await asyncio.gather(*self.scoring.values(), return_exceptions=True)
        finally:
            for task in self.scoring.values():
                task.cancel()
        return Outcome(chosen, self.rounds, stopped, time.monotonic() - started)

    async def drive(self) -> str:
        """Answers the strategy's requests until it ends; returns why."""
        value: Any = None
        try:
            while True:
                value = await self.respond(self.strategy.send(value))
        except StopIteration:
            return "rounds"
        except Stopped as reason:
            return str(reason)

    async def respond(self, request: Any) -> Any:
        """The answer to one request of the strategy."""
        if isinstance(request, Judge):
            if self.scorer is None:
                raise RequestError("refine.strategy: this strategy asks a scorer, and this endpoint has none", "refine.strategy")
            return await self.scores([self.round_of(draft.draft_id) for draft in request.drafts])
        if isinstance(request, Verify):
            return await self.verify(self.round_of(request.draft.draft_id))
        if isinstance(request, Score):
            self.round_of(request.draft.draft_id).score = request.value
        if isinstance(request, Skip | Score):
            return None
        if isinstance(request, Ask):
            (draft,) = await self.ask([request])
            return draft
        if isinstance(request, list):
            return await self.ask(request)
        what = {Made: "hands in its own texts", LogProb: "asks for log-probabilities"}.get(type(request), "needs a given draft")
        raise RequestError(f"refine.strategy: this strategy {what}; use another", "refine.strategy")

    async def ask(self, asks: list[Ask]) -> list[Draft]:
        """Sends the asks of a round to the engine at the same time. Raises Stopped if the round must not start."""
        if any(ask.model for ask in asks):
            raise RequestError("refine.strategy: this strategy asks another model; an endpoint has one", "refine.strategy")
        await self.check_stop(asks[0])
        first = not self.rounds
        encoded = [await self.engine.encode((*self.earlier, *ask.messages), first=first, prefix=ask.prefix) for ask in asks]
        budget = (self.refinement.budget_tokens - sum(round.num_tokens for round in self.rounds)) // len(asks)
        if budget < 1:
            raise Stopped("budget_tokens")
        new = [self.plan(ask, len(ids), budget) for ask, ids in zip(asks, encoded, strict=True)]
        self.rounds += new
        try:
            async with asyncio.TaskGroup() as group:
                for round, ids in zip(new, encoded, strict=True):
                    group.create_task(self.write(round, ids))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [self.end(round) for round in new]

    def plan(self, ask: Ask, num_prompt_tokens: int, budget: int) -> Round:
        """The round of an ask, with the tokens that it may write. Raises Stopped if its context leaves none."""
        room = self.engine.context_tokens - num_prompt_tokens
        if room < 1:
            raise Stopped("context")
        max_tokens, capped_by = min(self.engine.max_tokens, ask.max_tokens or self.engine.max_tokens), ""
        if budget < max_tokens:
            max_tokens, capped_by = budget, "budget_tokens"
        if room < max_tokens:  # the first response may fill the context, like any direct answer
            max_tokens, capped_by = room, "context" if self.rounds else ""
        place = (ask.sample, ask.round, ask.kind)
        again = self.places[place]
        self.places[place] += 1
        round = Round(ask, self.seed_of(ask, again), num_prompt_tokens, max_tokens, capped_by, text=ask.prefix, again=again)
        options = self.refinement.strategy
        round.is_live = (
            self.stream and self.refinement.select == "last" and self.refinement.deadline_s is None and round.is_answer
            and ask.round == options.rounds and options.name in STRATEGIES and not is_sampled(options) and not capped_by
        )  # fmt: skip
        return round

    def seed_of(self, ask: Ask, again: int) -> int | None:
        """The seed of a round: the request's own for the first response, so that it is the direct answer; derived for others."""
        if self.seed is None or (ask.round, ask.sample, ask.kind, again) == (1, 0, "answer", 0):
            return self.seed
        return derive_seed("serve", self.seed, ask.sample, ask.round, ask.kind, *([again] if again else []))

    async def write(self, round: Round, ids: list[int]) -> None:
        """Lets the engine write the response of a round. What is there when it is cancelled stays."""
        started = time.monotonic()
        pieces = self.engine.write(round.ask, ids, round.seed, round.max_tokens)
        try:
            async for piece in pieces:
                round.seconds = time.monotonic() - started
                if round.first_s is None:
                    round.first_s, round.num_cached_tokens = round.seconds, piece.num_cached_tokens
                round.text += piece.text
                round.num_tokens += piece.num_tokens
                round.token_ids += piece.token_ids
                round.stopped_at = piece.stopped_at
                round.finish_reason = piece.finish_reason
                round.outputs.append(piece.output)
                self.emit(Event("wrote", round, piece))
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
            if round.finish_reason is None:
                round.finish_reason, round.cut_by = "length", "deadline"

    def end(self, round: Round) -> Draft:
        """The draft of a finished round."""
        if round.finish_reason == "length" and round.capped_by:
            round.cut_by = round.capped_by
        ask, round.answer = round.ask, self.engine.answer(round.text, round.token_ids)
        draft_id = f"{ask.sample}/{ask.round}/{ask.kind}" + (f"/{round.again}" if round.again else "")
        place = (ask.sample, ask.round, ask.parent_id)
        round.draft = Draft(draft_id, round.answer, *place, round.finish_reason or "stop", round.stopped_at)
        self.emit(Event("ended", round))
        if self.shows_scores and round.is_answer:
            self.start_scoring(round)
        return round.draft

    def round_of(self, draft_id: str) -> Round:
        return next(round for round in self.rounds if round.draft and round.draft.draft_id == draft_id)

    async def check_stop(self, ask: Ask) -> None:
        """Raises Stopped before a new round if the draft that it would refine needs no refinement, or is cut for good."""
        if ask.round == 1 or ask.parent_id is None or any(round.ask.round == ask.round for round in self.rounds):
            return
        parent = self.round_of(ask.parent_id)
        if parent.cut_by:
            raise Stopped(parent.cut_by)
        if parent.finish_reason != "stop":
            return  # a draft that was cut by its own length is never a reason to stop, as in training
        if self.refinement.unchanged and parent.ask.parent_id and parent.answer == self.round_of(parent.ask.parent_id).answer:
            raise Stopped("unchanged")
        if self.refinement.verified and await self.verify(parent) == 1.0:
            raise Stopped("verified")

    async def verify(self, round: Round) -> Verdict:
        assert self.scorer is not None
        value = await self.scorer.verify(self.prompt, self.refinement.answer, round.answer)
        return Verdict(value, getattr(value, "text", ""))

    def start_scoring(self, round: Round) -> asyncio.Task:
        """The task that scores a round; each round is scored once."""
        assert round.draft is not None
        task = self.scoring.get(round.draft.draft_id)
        if task is None or task.cancelled():  # a deadline cancels the scoring that a strategy waits for
            task = self.scoring[round.draft.draft_id] = asyncio.create_task(self.score(round))
        return task

    async def score(self, round: Round) -> float:
        assert self.scorer is not None
        (round.score,) = await self.scorer.score(self.prompt, self.refinement.answer, [round.answer])
        self.emit(Event("scored", round))
        return float("-inf") if round.score is None else round.score

    async def scores(self, rounds: list[Round]) -> list[float]:
        """The scores of some rounds; one without a finite score never wins."""
        return list(await asyncio.gather(*[self.start_scoring(round) for round in rounds]))

    async def choose(self) -> Round:
        """The round whose draft is the answer. One that was cut by a limit is taken only if there is no other."""
        written = [round for round in self.rounds if round.is_answer and (round.draft or round.outputs)]
        for round in written:
            if round.draft is None:
                self.end(round)
        if live := [round for round in written if round.is_live]:
            return live[-1]
        answers = [round for round in written if not round.cut_by] or written
        if not answers:
            raise RequestError("the time of this request was over before the model wrote anything; try again", status=504)
        if self.refinement.select == "best":
            whole = [round for round in answers if round.finish_reason == "stop"] or answers
            scores = dict(zip(map(id, whole), await self.scores(whole), strict=True))
            return max(whole, key=lambda round: (scores[id(round)], round.ask.round, -round.ask.sample))
        if self.refinement.select == "vote":
            whole = [round for round in answers if round.finish_reason == "stop"] or answers
            return await self.vote(whole)
        last = max(round.ask.round for round in answers)
        final = [round for round in answers if round.ask.round == last]
        if len(final) > 1 and all(round.score is not None for round in final):
            return max(final, key=lambda round: (round.score, -round.ask.sample))
        return final[0]

    async def vote(self, rounds: list[Round]) -> Round:
        """The latest draft of the answer that most drafts give; of equally many, the answer that was given last."""
        texts = [round.answer for round in rounds]
        groups = await self.scorer.groups(texts) if self.scorer else [texts.index(text) for text in texts]
        latest = {group: place for place, group in enumerate(groups)}
        return rounds[latest[max(latest, key=lambda group: (groups.count(group), latest[group]))]]
