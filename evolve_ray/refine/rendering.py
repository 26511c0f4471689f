"""How the conversations of a run become text: what the recipe sets beside the model's own chat template."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from evolve_ray.config.options import Thinking

CLOCK = "strftime_now"  # the function by which a chat template asks for the date


@dataclass(frozen=True)
class Rendering:
    """What stands beside the tokenizer when a conversation is rendered.

    `chat_template` replaces the tokenizer's own template ("": it does not). `arguments` are passed to the template. `day`
    (YYYY-MM-DD) is the date that a template prints ("": today). `thinking` says how a response is split into thinking and answer.
    """

    chat_template: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    day: str = ""
    thinking: Thinking = field(default_factory=Thinking)

    @property
    def key(self) -> list[Any]:
        """What decides the tokens of a context and the text of an answer; [] if all of it is the model's own."""
        options = vars(self.thinking)
        if (self.chat_template, self.arguments, self.day, options) == ("", {}, "", vars(Thinking())):
            return []
        return [self.chat_template, self.arguments, self.day, options]

    @property
    def for_reward_model(self) -> "Rendering":
        """Of all this, what holds for a model with a chat template of its own: the day."""
        return Rendering(day=self.day)

    def template_arguments(self) -> dict[str, Any]:
        """All arguments of the template; its clock stands still."""
        return self.arguments | ({CLOCK: clock(self.day)} if self.day else {})


def clock(day: str) -> Callable[[str], str]:
    """A clock for chat templates that always shows midnight of one day."""
    return date.fromisoformat(day).strftime
