"""What a strategy can ask for, and the drafts that it receives.

The strategies themselves are in `strategies.py`, the wording of the asks is in `template.py`.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from evolve_ray.store.turns import Messages


@dataclass(frozen=True)
class Draft:
    """One response of the model. `round` counts from 1; `parent_id` is the id of the draft that it refines.

    `stopped_at` is the stop string of its ask at which it ended; "" if it ended by itself, or was cut.
    """

    draft_id: str
    text: str
    sample: int
    round: int
    parent_id: str | None
    finish_reason: str
    stopped_at: str = ""


@dataclass(frozen=True)
class Ask:
    """One request to the model: the chat messages, and the place of the response in the strategy.

    A response whose `kind` is not "answer" (a critique) is stored, but neither scored nor trained on.

    `temperature` and `max_tokens` replace the recipe's for this ask. The response ends before the first of the `stop` strings.
    The model continues `prefix`, a beginning of its response: the draft's text is prefix and continuation. `model` names a model
    of the recipe's [models]; "" is the policy.
    """

    messages: Messages
    sample: int
    round: int
    parent_id: str | None = None
    kind: str = "answer"
    temperature: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    prefix: str = ""
    model: str = ""

    @property
    def sampling(self) -> dict[str, Any]:
        """What this ask sets in place of the recipe's sampling: `temperature`, `max_tokens`, `stop`; {} if nothing."""
        own = {"temperature": self.temperature, "max_tokens": self.max_tokens, "stop": list(self.stop) or None}
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class Judge:
    """One request to the recipe's scorer. The strategy receives one score for each draft; higher is better."""

    drafts: tuple[Draft, ...]


class Verdict(float):
    """A verifier's value with its words, `text`: why a response is wrong, for example the output of a failed test."""

    text: str

    def __new__(cls, value: float, text: str = "") -> "Verdict":
        verdict = super().__new__(cls, value)
        verdict.text = text
        return verdict

    def __getnewargs__(self) -> tuple[float, str]:  # type: ignore[override]
        return float(self), self.text


@dataclass(frozen=True)
class Verify:
    """One request to the recipe's verifier. The strategy receives a `Verdict` on the draft; 1.0 is exactly right.

    Its `text` is empty if the verifier has no words.
    """

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


@dataclass(frozen=True)
class Score:
    """Sets the score of a draft that the strategy judged itself, for `scorer.name = "strategy"`. It receives None."""

    draft: Draft
    value: float


@dataclass(frozen=True)
class Made:
    """Hands in a draft that the strategy composed, for example from `parts`, earlier drafts. The strategy receives the draft.

    It becomes a row like every other, but no model wrote it as a whole: it has no model, no seed and no tokens of its own.
    """

    text: str
    sample: int
    round: int
    parent_id: str | None = None
    kind: str = "answer"
    parts: tuple[Draft, ...] = ()


@dataclass(frozen=True)
class LogProb:
    """One request for the log-probability of `text` as the response to `messages` under the model that writes the drafts.

    The strategy receives a float in nats, the sum over the text's tokens; with `finished` the end token counts too. Nothing is
    stored.
    """

    messages: Messages
    text: str
    finished: bool = True


Strategy = Generator[Ask | list[Ask] | Judge | Verify | Skip | Given | Score | Made | LogProb, Any, list[Draft]]
