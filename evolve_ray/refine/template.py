"""The words around prompts and drafts: a template, its parts, and how they become chat messages."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evolve_ray.errors import UserError
from evolve_ray.refine.asks import Messages
from evolve_ray.store.rows import digest

# The parts of a template and the fields that each must have. A strategy that is not named needs the first three alone.
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
ALWAYS = ("first", "refine", "one_message")
NEEDED = {
    "few_shot": ("several",),
    "critique": ("critique", "revise", "critique_one_message", "revise_one_message"),
}


@dataclass(frozen=True)
class Template:
    """The words around prompts and drafts, in one of the two layouts."""

    layout: str
    first: str
    refine: str
    one_message: str
    several: str = ""
    critique: str = ""
    revise: str = ""
    critique_one_message: str = ""
    revise_one_message: str = ""

    def direct(self, prompt: str) -> Messages:
        """The messages of round 1: `x`."""
        return (user(fill(self.first, prompt=prompt)),)

    def refinement(self, prompt: str, draft: str) -> Messages:
        """The messages that ask for a better draft: `(x, y, z)`."""
        return self.after_several(prompt, [draft])

    def after_several(self, prompt: str, drafts: Sequence[str]) -> Messages:
        """The messages that ask for a better draft with several in view, the last one nearest: `(x, y_a, z, y_b, z)`."""
        if self.layout == "conversation":
            turns = [turn for draft in drafts for turn in (assistant(draft), user(self.refine))]
            return (*self.direct(prompt), *turns)
        if len(drafts) == 1:
            return (user(fill(self.one_message, prompt=prompt, draft=drafts[0])),)
        numbered = "\n\n".join(f"({number}) {draft}" for number, draft in enumerate(drafts, start=1))
        return (user(fill(self.several, prompt=prompt, drafts=numbered)),)

    def critical(self, prompt: str, draft: str) -> Messages:
        """The messages that ask what is wrong with a draft."""
        if self.layout == "one_message":
            return (user(fill(self.critique_one_message, prompt=prompt, draft=draft)),)
        return (*self.direct(prompt), assistant(draft), user(self.critique))

    def revision(self, prompt: str, draft: str, critique: str) -> Messages:
        """The messages that ask for a better draft in the light of a critique."""
        if self.layout == "one_message":
            return (user(fill(self.revise_one_message, prompt=prompt, draft=draft, critique=critique)),)
        return (*self.critical(prompt, draft), assistant(critique), user(self.revise))

    @property
    def hash(self) -> str:
        return digest([self.layout, *(getattr(self, part) for part in FIELDS)])


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def fill(text: str, **values: str) -> str:
    """Puts values into `{name}` fields in one pass: braces inside a value stay text."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match.group(1), match.group(0)), text)


def load_template(name: str, layout: str, strategy: str = "chain") -> Template:
    """A shipped template by name, or a user's TOML file; every part that the strategy needs must be there with its fields."""
    path = Path(name) if name.endswith(".toml") else Path(__file__).parent / "templates" / f"{name}.toml"
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except FileNotFoundError:
        shipped = sorted(file.stem for file in (Path(__file__).parent / "templates").glob("*.toml"))
        raise UserError(f"template.name: no template {name!r}; shipped are {', '.join(shipped)}, or give a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a valid template: {error}") from None
    for key in tree:
        if key not in FIELDS:
            raise UserError(f"{path}: {key}: unknown part of a template; known are {', '.join(FIELDS)}")
    needed = (*ALWAYS, *NEEDED.get(strategy, ()))
    for key in needed:
        if not isinstance(tree.get(key), str) or not tree[key].strip():
            raise UserError(f"{path}: {key}: is missing or empty; strategy {strategy!r} needs {', '.join(needed)}")
    for key, text in tree.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: {key}: must be a string")
        for field in FIELDS[key]:
            if "{" + field + "}" not in text:
                raise UserError(f"{path}: {key}: lacks the field {{{field}}}")
    return Template(layout=layout, **{key: value.strip("\n") for key, value in tree.items()})
