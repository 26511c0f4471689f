"""Builds the recipe's scorer: a reward model, the verifier, a plug, or the mean or minimum of several scorers."""

import collections
import math
from collections.abc import Callable
from typing import Any

from evolve_ray.config import options
from evolve_ray.config.plugs import blame, find_plug, with_args
from evolve_ray.errors import UserError
from evolve_ray.score.judge import Judge
from evolve_ray.score.judge_engine import JudgeSpec
from evolve_ray.score.protocol import Scorer, call_scorer, is_finite
from evolve_ray.score.reward_model import RewardModel
from evolve_ray.score.vote import StrategyScores, Vote


class Combined:
    """The mean or the minimum of several scorers for each response; NaN if one of them gives no finite number."""

    def __init__(self, members: dict[str, Scorer], combine: Callable[[list[float]], float]):
        self.members, self.combine = members, combine

    def __call__(self, prompts: list[Any], answers: list[str | None], responses: list[str]) -> list[float]:
        columns = [
            call_scorer(f"scorer member {name}", member, prompts, answers, responses) for name, member in self.members.items()
        ]
        return [self.combine(list(row)) if all(map(is_finite, row)) else math.nan for row in zip(*columns, strict=True)]


REWARD_MODEL = "reward_model="  # a member of this form is a reward model
JUDGES: dict[str, Callable[..., Scorer]] = {"judge": Judge}  # scorers of this package that have `args`
COMBINATIONS: dict[str, Callable[[list[float]], float]] = {"mean": lambda values: sum(values) / len(values), "minimum": min}


def reward_model_names(scorer: options.Scorer) -> list[str]:
    """The names of the reward models that the scorer needs, as the recipe writes them."""
    if scorer.name == "reward_model":
        return [scorer.model]
    return [member.removeprefix(REWARD_MODEL) for member in scorer.members if member.startswith(REWARD_MODEL)]


def local_judge(scorer: options.Scorer) -> str:
    """The model of a judge with an engine of its own, as the recipe names it; "" if there is none."""
    return str(scorer.args.get("model", "")) if scorer.name in JUDGES and not scorer.args.get("url") else ""


def reward_model_field(scorer: options.Scorer) -> str:
    """The option in which the recipe names the reward models."""
    return "scorer.members" if scorer.members else "scorer.model"


def build_scorer(
    scorer: options.Scorer, reward_models: dict[str, str], verifier: Scorer | None, day: str = "",
    grading: options.Verifier | None = None, judge: JudgeSpec | None = None,
) -> Scorer:  # fmt: skip
    """The scorer of a recipe. `reward_models` maps the names in the recipe to local folders; `verifier` is the recipe's.

    `grading` are its options, by which votes are counted; `judge` is the engine of a judge without a server; `day` is the date
    that their chat templates print ("": today).
    """
    if scorer.name == "reward_model":
        return RewardModel(scorer, reward_models[scorer.model], day=day)
    if scorer.name in JUDGES:
        return with_args("scorer.args", scorer.name, JUDGES[scorer.name], scorer.args)(scorer, spec=judge)
    if scorer.name == "vote":
        return with_args("scorer.args", "vote", Vote, scorer.args)(grading)
    if scorer.name == "strategy":
        return StrategyScores()
    if scorer.name in COMBINATIONS:
        for member, count in collections.Counter(scorer.members).items():
            if count > 1:
                raise UserError(f"scorer.members: {member!r} occurs {count} times; name each scorer once")
        members = {member: build_member(member, scorer, reward_models, verifier, day) for member in scorer.members}
        return Combined(members, COMBINATIONS[scorer.name])
    return build_member(scorer.name, scorer, reward_models, verifier, day)


def build_member(
    member: str, scorer: options.Scorer, reward_models: dict[str, str], verifier: Scorer | None, day: str
) -> Scorer:  # fmt: skip
    """One scorer by its name: the verifier, a reward model, or a plug."""
    if member == "verifier":
        if verifier is None:
            raise UserError("verifier: must be set when the verifier is the scorer; add a [verifier] table")
        return verifier
    if member.startswith(REWARD_MODEL):
        return RewardModel(scorer, reward_models[member.removeprefix(REWARD_MODEL)], "scorer.members", day)
    field = "scorer.members" if scorer.members else "scorer.name"
    plug = with_args("scorer.args", member, find_plug({}, member, field), scorer.args)
    with blame(field, member):
        return plug()
