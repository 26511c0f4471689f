"""Templates: the words around prompts and drafts, and how they become chat messages."""

import dataclasses
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evolve_ray.errors import UserError
from evolve_ray.refine.asks import Messages
from evolve_ray.refine.ratings import RATING
from evolve_ray.refine.rendering import Rendering
from evolve_ray.store.rows import digest
from evolve_ray.store.turns import Prompt, assistant, earlier_turns, last_turn, user

# The parts of a template, and the fields that each part must contain.
FIELDS = {
    "first": ("prompt",),
    "refine": (),
    "one_message": ("prompt", "draft"),
    "several": ("prompt", "drafts"),
    "critique": (),
    "revise": (),
    "critique_one_message": ("prompt", "draft"),
    "revise_one_message": ("prompt", "draft", "critique"),
}
JUDGE = (
    "prompt",
    "response",
)  # the fields of the part `judge`, which is RATING if a file leaves it out; it may use {low}, {high}
ALWAYS = ("first", "refine", "one_message")  # the parts that every strategy needs
NEEDED = {  # the further parts that a strategy needs
    "few_shot": ("several",),
    "feedback": ("revise_one_message",),
    "critique": ("critique", "revise", "critique_one_message", "revise_one_message"),
}


@dataclass(frozen=True)
class Template:
    """The words around prompts and drafts. `layout` is "conversation" or "one_message".

    `rendering` is how the messages become text afterwards; it travels with the words, because both decide what a model is asked.
    """

    layout: str
    first: str
    refine: str
    one_message: str
    several: str = ""
    critique: str = ""
    revise: str = ""
    critique_one_message: str = ""
    revise_one_message: str = ""
    judge: str = ""
    rendering: Rendering = dataclasses.field(default_factory=Rendering)

    def direct(self, prompt: Prompt) -> Messages:
        """The messages that ask for round 1: `x`."""
        return self.filled(self.first, prompt)

    def refinement(self, prompt: Prompt, draft: str) -> Messages:
        """The messages that ask for a better draft: `(x, y, z)`."""
        return self.after_several(prompt, [draft])

    def after_several(self, prompt: Prompt, drafts: Sequence[str]) -> Messages:
        """The messages that ask for a better draft after several drafts, in their order: `(x, y_a, z, y_b, z)`."""
        if self.layout == "conversation":
            asked = [turn for draft in drafts for turn in (assistant(draft), user(self.refine))]
            return (*self.direct(prompt), *asked)
        if len(drafts) == 1:
            return self.filled(self.one_message, prompt, draft=drafts[0])
        numbered = "\n\n".join(f"({number}) {draft}" for number, draft in enumerate(drafts, start=1))
        return self.filled(self.several, prompt, drafts=numbered)

    def critical(self, prompt: Prompt, draft: str) -> Messages:
        """The messages that ask for a critique of a draft."""
        if self.layout == "one_message":
            return self.filled(self.critique_one_message, prompt, draft=draft)
        return (*self.direct(prompt), assistant(draft), user(self.critique))

    def revision(self, prompt: Prompt, draft: str, critique: str) -> Messages:
        """The messages that ask for a better draft that uses a critique."""
        if self.layout == "one_message":
            return self.filled(self.revise_one_message, prompt, draft=draft, critique=critique)
        return (*self.critical(prompt, draft), assistant(critique), user(self.revise))

    def after_feedback(self, prompt: Prompt, draft: str, words: str) -> Messages:
        """The messages that ask for a better draft and show what the verifier says about this one."""
        if self.layout == "one_message":
            return self.filled(self.revise_one_message, prompt, draft=draft, critique=words)
        return (*self.direct(prompt), assistant(draft), user(f"{words}\n\n{self.refine}".strip()))

    def judgement(self, prompt: Prompt, response: str, low: float, high: float) -> Messages:
        """The messages that ask for a rating of a response from `low` to `high`."""
        return self.filled(self.judge or RATING, prompt, response=response, low=f"{low:g}", high=f"{high:g}")

    def filled(self, part: str, prompt: Prompt, **values: str) -> Messages:
        """The prompt with its last user turn inside a part of the template; its earlier turns stay as they are."""
        return (*earlier_turns(prompt), user(fill(part, prompt=last_turn(prompt), **values)))

    @property
    def hash(self) -> str:
        judge = [{"judge": self.judge}] if self.judge else []
        return digest([self.layout, *(getattr(self, part) for part in FIELDS), *judge, *self.rendering.key])


def fill(text: str, **values: str) -> str:
    """Puts the values into the `{name}` fields of a text, in one pass: braces inside a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match.group(1), match.group(0)), text)


def load_template(name: str, layout: str, strategy: str = "chain") -> Template:
    """A shipped template by its name, or a user's TOML file.

    Raises UserError if a part that the strategy needs is missing, a part lacks one of its fields, or a part is unknown.
    """
    path = Path(name) if name.endswith(".toml") else Path(__file__).parent / "templates" / f"{name}.toml"
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except FileNotFoundError:
        shipped = sorted(file.stem for file in (Path(__file__).parent / "templates").glob("*.toml"))
        raise UserError(f"template.name: no template {name!r}; use one of {', '.join(shipped)}, or a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a valid TOML file: {error}") from None
    fields = FIELDS | {"judge": JUDGE}
    for key in tree:
        if key not in fields:
            raise UserError(f"{path}: {key}: is not a part of a template; the parts are {', '.join(fields)}")
    needed = (*ALWAYS, *NEEDED.get(strategy, ()))
    for key in needed:
        if not isinstance(tree.get(key), str) or not tree[key].strip():
            raise UserError(f"{path}: {key}: is missing or empty; strategy {strategy!r} needs {', '.join(needed)}")
    for key, text in tree.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: {key}: must be a string")
        for field in fields[key]:
            if "{" + field + "}" not in text:
                raise UserError(f"{path}: {key}: has no field {{{field}}}; add it")
    return Template(layout=layout, **{key: value.strip("\n") for key, value in tree.items()})
