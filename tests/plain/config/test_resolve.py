"""What of a configuration is in a stage key."""

from dataclasses import dataclass

import pytest

from evolve_ray.config.option import option
from evolve_ray.config.resolve import resolved


@dataclass(frozen=True)
class Table:
    old: int = option("an option of the first version", 1)
    new: int = option("an option that was added", 2, later=True)
    names: list = option("a list that was added", ["a"], later=True)
    speed: int = option("an option that changes no result", 3, runtime=True)


@pytest.mark.parametrize(
    ("part", "keyed"),
    [
        (Table(), {"old": 1}),
        (Table(new=2, names=["a"], speed=4), {"old": 1}),
        (Table(new=3, names=[]), {"old": 1, "new": 3, "names": []}),
    ],
)
def test_an_option_that_was_added_later_is_in_a_key_only_if_it_is_set(part, keyed):
    assert resolved(part, runtime=False) == keyed
    assert resolved(part).keys() == {"old", "new", "names", "speed"}
