"""What a strategy can ask for, and the drafts that it receives.

The strategies themselves are in `strategies.py`, the wording of the asks is in `template.py`.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from evolve_ray.store.turns import Messages


@dataclass(frozen=True)
class Draft:
    """One response of the model. `round` counts from 1; `parent_id` is the id of the draft that it refines."""

    draft_id: str
    text: str
    sample: int
    round: int
    parent_id: str | None
    finish_reason: str


@dataclass(frozen=True)
class Ask:
    """One request to the model: the chat messages, and the place of the response in the strategy.

    A response whose `kind` is not "answer" (a critique) is stored, but neither scored nor trained on.
    """

    messages: Messages
    sample: int
    round: int
    parent_id: str | None = None
    kind: str = "answer"


@dataclass(frozen=True)
class Judge:
    """One request to the recipe's scorer. The strategy receives one score for each draft; higher is better."""

    drafts: tuple[Draft, ...]


@dataclass(frozen=True)
class Verify:
    """One request to the recipe's verifier. The strategy receives the verifier's value for the draft; 1.0 is exactly right."""

    draft: Draft


@dataclass(frozen=True)
class Skip:
    """Leaves out `rounds`, because `draft` needs no refinement; `reason` says why. The strategy receives None."""

    draft: Draft
    rounds: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Given:
    """Uses the text in column `draft` of the prompt's row as round 1; nothing is generated. The strategy receives the draft."""


Strategy = Generator[Ask | list[Ask] | Judge | Verify | Skip | Given, Any, list[Draft]]
