"""The selections of this package by their short names."""

from collections.abc import Callable

from evolve_ray.select.accepted import accepted
from evolve_ray.select.advantages import advantages
from evolve_ray.select.pairs import Selected, random_pairs, reward_model, rule
from evolve_ray.select.reflections import reflections
from evolve_ray.select.tiers import tiers
from evolve_ray.select.trajectories import trajectories
from evolve_ray.select.turn_advantages import turn_advantages

SELECTIONS: dict[str, Callable[..., Selected]] = {
    "reward_model": reward_model,
    "rule": rule,
    "random": random_pairs,
    "advantages": advantages,
    "turn_advantages": turn_advantages,
    "reflections": reflections,
    "trajectories": trajectories,
    "accepted": accepted,
    "tiers": tiers,
}
