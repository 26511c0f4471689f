"""The field `refine` of a request: how often, by which strategy, which draft is the answer, when to stop early.

It stands in the body, beside OpenAI's fields. No text of a message is ever read for it.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from evolve_ray.config import options
from evolve_ray.refine.strategies import STRATEGIES, asks_scorer, asks_verifier, drafts_per_prompt, gives_scores
from evolve_ray.refine.template import NEEDED, Template
from evolve_ray.serve.errors import RequestError

SAMPLED = ("parallel", "chains", "best_of", "self_judge")  # strategies that ask for several samples in one round
SELECTS = ("last", "best", "vote")


class Part(BaseModel):
    """A part of the field: an unknown name is refused, and no value is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StopFields(Part):
    unchanged: bool | None = None
    verified: bool | None = None
    budget_tokens: int | None = None
    deadline_s: float | None = None


class StrategyFields(Part):
    name: str | None = None
    samples: int | None = None
    shots: int | None = None
    show: Literal["last", "best"] | None = None


class RefineFields(Part):
    """The field as a client writes it."""

    rounds: int | None = None
    strategy: StrategyFields | None = None
    select: Literal["last", "best", "vote"] | None = None
    stop: StopFields | None = None
    show: Literal["final", "all"] | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Refinement:
    """What one request asks for, checked, with the defaults of the recipe. `show_all`: the client sees every draft."""

    strategy: options.Strategy
    select: str  # "last", "best" or "vote"
    unchanged: bool
    verified: bool
    budget_tokens: int
    deadline_s: float | None
    show_all: bool
    answer: str | None  # the known right answer, for a verifier that needs one
    is_direct: bool  # one round without any of the above: the reply is the engine's own

    @property
    def width(self) -> int:
        """The most rounds of this request that run at the same time."""
        return (
            self.strategy.samples
            if self.strategy.name in SAMPLED
            else self.strategy.critiques
            if is_sampled(self.strategy)
            else 1
        )


@dataclass(frozen=True)
class Rules:
    """What the endpoint can do, and what a request may ask of it."""

    strategy: options.Strategy
    template: Template
    limits: options.Serve
    has_scorer: bool
    has_verifier: bool

    def read(self, body: Any, *, stream: bool) -> Refinement:
        """The refinement that the field `refine` of a body asks for; None stands for a body without it.

        Raises RequestError, which names the field, for anything unknown, out of range or impossible here.
        """
        fields = parse(body)
        strategy = self.strategy_of(fields)
        select = fields.select or self.default_select(strategy)
        if select == "best" and not self.has_scorer:
            raise RequestError(
                "refine.select: 'best' needs a scorer, and this endpoint has none; use 'last' or 'vote'", "refine.select"
            )
        stop = fields.stop or StopFields()
        if stop.verified and not self.has_verifier:
            raise RequestError("refine.stop.verified: this endpoint has no verifier; remove it", "refine.stop.verified")
        within("refine.stop.budget_tokens", stop.budget_tokens, 1, self.limits.max_tokens)
        within("refine.stop.deadline_s", stop.deadline_s, 0, self.limits.max_seconds)
        show_all = stream if fields.show is None else fields.show == "all"
        asks_for_one = drafts_per_prompt(strategy) == 1 and strategy.name in STRATEGIES
        limited = stop.budget_tokens is not None or stop.deadline_s is not None
        return Refinement(
            strategy=strategy,
            select=select,
            unchanged=self.strategy.stop_unchanged if stop.unchanged is None else stop.unchanged,
            verified=self.has_verifier and (self.strategy.stop_right if stop.verified is None else stop.verified),
            budget_tokens=stop.budget_tokens or self.limits.max_tokens,
            deadline_s=stop.deadline_s,
            show_all=show_all,
            answer=fields.answer,
            is_direct=asks_for_one and not limited and fields.show != "all",
        )

    def strategy_of(self, fields: RefineFields) -> options.Strategy:
        """The options of the strategy: the recipe's, replaced by those of the request."""
        wanted = fields.strategy or StrategyFields()
        name = wanted.name or self.strategy.name
        names = list(dict.fromkeys([*STRATEGIES, self.strategy.name]))
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"use one of {', '.join(names)}"
            raise RequestError(f"refine.strategy: {name!r} is not a strategy of this endpoint; {hint}", "refine.strategy")
        missing = [part for part in NEEDED.get(name, ()) if not getattr(self.template, part)]
        if missing:
            raise RequestError(
                f"refine.strategy: {name!r} needs {', '.join(missing)}, which the template of this model does not have; "
                "use another strategy",
                "refine.strategy",
            )
        within("refine.rounds", fields.rounds, 1, self.limits.max_rounds)
        within("refine.strategy.samples", wanted.samples, 1, self.limits.max_samples)
        within("refine.strategy.shots", wanted.shots, 1, self.limits.max_rounds)
        replaced: dict[str, Any] = {
            "name": name, "rounds": fields.rounds, "samples": wanted.samples, "shots": wanted.shots, "show": wanted.show
        }  # fmt: skip
        strategy = dataclasses.replace(
            self.strategy,
            stop_unchanged=False,  # the endpoint stops every strategy by the same rule, not only `chain`
            stop_right=False,
            args=self.strategy.args if name == self.strategy.name else {},
            **{option: value for option, value in replaced.items() if value is not None},
        )
        if self.asks_scorer(strategy) and not self.has_scorer:
            raise RequestError(
                f"refine.strategy: {name!r} asks a scorer, and this endpoint has none; use 'chain'", "refine.strategy"
            )
        if strategy.name in STRATEGIES and asks_verifier(strategy) and not self.has_verifier:
            raise RequestError(
                f"refine.strategy: {name!r} asks a verifier, and this endpoint has none; use 'chain'", "refine.strategy"
            )
        return strategy

    def asks_scorer(self, strategy: options.Strategy) -> bool:
        """Whether a shipped strategy asks the scorer between its rounds."""
        return strategy.name in STRATEGIES and asks_scorer(strategy)

    def can_use(self, name: str) -> bool:
        """Whether a request may name this strategy."""
        try:
            self.strategy_of(RefineFields(strategy=StrategyFields(name=name)))
        except RequestError:
            return False
        return True

    def default_select(self, strategy: options.Strategy) -> str:
        """The last draft refines all that is known; of several samples, none is the last one, unless the model rates them."""
        if not is_sampled(strategy) or gives_scores(strategy):
            return "last"
        return "best" if self.has_scorer else "vote"


def is_sampled(strategy: options.Strategy) -> bool:
    """Whether a strategy asks for several responses at a time, so that none is the last one."""
    return strategy.name in SAMPLED or (strategy.name == "critique" and strategy.critiques > 1)


def within(field: str, value: float | None, low: float, high: float) -> None:
    """Raises RequestError unless the value is None or between the bounds; a low bound of 0 is excluded."""
    if value is not None and not (low <= value <= high and value > 0):
        least = f"at least {low:g}" if low else "above 0"
        raise RequestError(f"{field}: is {value:g}, but must be {least} and at most {high:g}", field)


def parse(body: Any) -> RefineFields:
    """The field as it is written, with short forms resolved: `strategy` by its name alone, `stop` as names of rules.

    `samples` and `shots` may stand beside `strategy` in place of inside it.
    """
    if body is None:
        return RefineFields()
    if not isinstance(body, dict):
        raise RequestError(f"refine: is {plain_type(body)}, but must be an object", "refine")
    body = dict(body)
    strategy = body.pop("strategy", None)
    strategy = {"name": strategy} if isinstance(strategy, str) else {} if strategy is None else strategy
    if isinstance(strategy, dict):
        strategy = strategy | {name: body.pop(name) for name in ("samples", "shots") if name in body}
    stop = body.pop("stop", None)
    if isinstance(stop, str):
        stop = [stop]
    if isinstance(stop, list) and all(name in ("unchanged", "verified") for name in stop):
        stop = dict.fromkeys(stop, True)
    try:
        return RefineFields.model_validate(body | {"strategy": strategy, "stop": stop})
    except ValidationError as error:
        raise field_error(error) from None


def field_error(error: ValidationError) -> RequestError:
    """The first fault that pydantic found, as one sentence with the field's name and the nearest known one."""
    fault = error.errors()[0]
    place = [str(part) for part in fault["loc"]]
    field = ".".join(["refine", *place])
    if fault["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {"stop": StopFields, "strategy": StrategyFields}
        kind = parts[place[0]] if len(place) > 1 else RefineFields
        nearest = difflib.get_close_matches(place[-1], kind.model_fields, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the fields here are {', '.join(kind.model_fields)}"
        return RequestError(f"{field}: is not a field; {hint}", field)
    message = fault["msg"].removeprefix("Input should be ")
    return RequestError(f"{field}: must be {message}", field)


def plain_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "an object")
