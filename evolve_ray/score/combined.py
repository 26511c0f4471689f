"""The recipe's scorer: one of the known ones, a plug, or a mean or minimum of several."""

import collections
import math
from collections.abc import Callable

from evolve_ray.config import options as config
from evolve_ray.config.plugs import find_plug
from evolve_ray.errors import UserError
from evolve_ray.score.protocol import Scorer, checked, is_finite
from evolve_ray.score.reward_model import RewardModel


class Combined:
    """The mean or the minimum of several scorers, response by response; NaN where any of them gives no finite number."""

    def __init__(self, members: dict[str, Scorer], combine: Callable[[list[float]], float]):
        self.members, self.combine = members, combine

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        columns = [checked(f"scorer member {name}", member, prompts, answers, responses) for name, member in self.members.items()]
        return [self.combine(list(row)) if all(map(is_finite, row)) else math.nan for row in zip(*columns, strict=True)]


COMBINATIONS: dict[str, Callable[[list[float]], float]] = {"mean": lambda values: sum(values) / len(values), "minimum": min}


def reward_model_names(options: config.Scorer) -> list[str]:
    """The reward models that a recipe's scorer hosts, by the names that the recipe gives them."""
    if options.name == "reward_model":
        return [options.model]
    return [member.removeprefix(REWARD_MODEL) for member in options.members if member.startswith(REWARD_MODEL)]


def reward_model_field(options: config.Scorer) -> str:
    """The option that names them."""
    return "scorer.members" if options.members else "scorer.model"


REWARD_MODEL = "reward_model="  # a member of this form is a reward model


def build_scorer(options: config.Scorer, reward_models: dict[str, str], verifier: Scorer | None) -> Scorer:
    """The scorer of a recipe. `reward_models`: its reward models' names -> local folders; `verifier`: the recipe's own."""
    if options.name == "reward_model":
        return RewardModel(options, reward_models[options.model])
    if options.name in COMBINATIONS:
        for member, count in collections.Counter(options.members).items():
            if count > 1:
                raise UserError(f"scorer.members: {member!r} stands there {count} times; name each scorer once")
        members = {member: build_member(member, options, reward_models, verifier) for member in options.members}
        return Combined(members, COMBINATIONS[options.name])
    return build_member(options.name, options, reward_models, verifier)


def build_member(member: str, options: config.Scorer, reward_models: dict[str, str], verifier: Scorer | None) -> Scorer:
    if member == "verifier":
        if verifier is None:
            raise UserError("verifier: must be set when the verifier is the scorer; add a [verifier] table")
        return verifier
    if member.startswith(REWARD_MODEL):
        return RewardModel(options, reward_models[member.removeprefix(REWARD_MODEL)], "scorer.members")
    return find_plug({}, member, "scorer.members" if options.members else "scorer.name")()
