"""The selections of this package by their short names."""

from collections.abc import Callable

from evolve_ray.select.advantages import advantages
from evolve_ray.select.pairs import Selected, random_pairs, reward_model, rule

SELECTIONS: dict[str, Callable[..., Selected]] = {
    "reward_model": reward_model,
    "rule": rule,
    "random": random_pairs,
    "advantages": advantages,
}
