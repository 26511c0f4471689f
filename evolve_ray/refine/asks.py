"""What is asked of the model, and in which words: asks, drafts and the template around them.

The strategies that put these to use are in `strategies.py`.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Draft:
    """One response of the model. `round` counts from 1; `parent_id` is the draft that it refines."""

    draft_id: str
    text: str
    sample: int
    round: int
    parent_id: str | None
    finish_reason: str


@dataclass(frozen=True)
class Ask:
    """One request to the model: chat messages, and where in the strategy the response belongs.

    A response of another `kind` than "answer" (a critique) helps on the way: it is kept, but neither scored nor trained on.
    """

    messages: Messages
    sample: int
    round: int
    parent_id: str | None = None
    kind: str = "answer"


@dataclass(frozen=True)
class Judge:
    """One request to the recipe's scorer: the strategy receives one number for each draft, higher is better."""

    drafts: tuple[Draft, ...]


@dataclass(frozen=True)
class Verify:
    """One request to the recipe's verifier: the strategy receives its value of a draft, 1.0 for exactly right."""

    draft: Draft


@dataclass(frozen=True)
class Skip:
    """No request: these rounds are left out, since `draft` needs no refinement for this reason. The strategy receives None."""

    draft: Draft
    rounds: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Given:
    """A request for the draft that the prompt's row brings along in its column `draft`: round 1, nothing is generated."""


Strategy = Generator[Ask | list[Ask] | Judge | Verify | Skip | Given, Any, list[Draft]]
