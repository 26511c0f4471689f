"""Refinement strategies and templates: what is asked of the model, in which words, with which drafts in view.

A strategy is a plain generator: it yields one `Ask` (or a list of them) and receives one `Draft` (or a list), and returns
all drafts of its prompt. It knows no engine: `list(...)` and a dictionary are enough to test it.
"""

import importlib
import re
import tomllib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError
from evolve_ray.rows import digest

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
    """One request to the model: chat messages, and where in the strategy the answer belongs."""

    messages: Messages
    sample: int
    round: int
    parent_id: str | None = None


Strategy = Generator[Ask | list[Ask], Any, list[Draft]]


@dataclass(frozen=True)
class Template:
    """The words around prompts and drafts, in one of the two layouts."""

    layout: str
    first: str
    refine: str
    one_message: str

    def direct(self, prompt: str) -> Messages:
        """The messages of round 1: `x`."""
        return ({"role": "user", "content": fill(self.first, prompt=prompt)},)

    def refinement(self, prompt: str, draft: str) -> Messages:
        """The messages that ask for a better draft: `(x, y, z)`."""
        if self.layout == "one_message":
            return ({"role": "user", "content": fill(self.one_message, prompt=prompt, draft=draft)},)
        return (
            *self.direct(prompt),
            {"role": "assistant", "content": draft},
            {"role": "user", "content": self.refine},
        )

    @property
    def hash(self) -> str:
        return digest([self.layout, self.first, self.refine, self.one_message])


def fill(text: str, **values: str) -> str:
    """Puts values into `{name}` fields in one pass: braces inside a value stay text."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match.group(1), match.group(0)), text)


FIELDS = {"first": ("prompt",), "refine": (), "one_message": ("prompt", "draft")}


def load_template(name: str, layout: str) -> Template:
    """A shipped template by name, or a user's TOML file; every field must be present exactly as documented."""
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
    for key, fields in FIELDS.items():
        if not isinstance(tree.get(key), str) or not tree[key].strip():
            raise UserError(f"{path}: {key}: is missing or empty; a template needs {', '.join(FIELDS)}")
        for field in fields:
            if "{" + field + "}" not in tree[key]:
                raise UserError(f"{path}: {key}: lacks the field {{{field}}}")
    return Template(layout=layout, **{key: value.strip("\n") for key, value in tree.items()})


def chain(prompt: str, template: Template, options: Any) -> Strategy:
    """`options.rounds` drafts, each a refinement of the one before (the paper's choice)."""
    draft = yield Ask(template.direct(prompt), sample=0, round=1)
    drafts = [draft]
    for number in range(2, options.rounds + 1):
        draft = yield Ask(template.refinement(prompt, draft.text), sample=0, round=number, parent_id=draft.draft_id)
        drafts.append(draft)
    return drafts


def parallel(prompt: str, template: Template, options: Any) -> Strategy:
    """`options.samples` independent drafts from the prompt alone."""
    drafts = yield [Ask(template.direct(prompt), sample=number, round=1) for number in range(options.samples)]
    return drafts


STRATEGIES: dict[str, Callable[..., Strategy]] = {"chain": chain, "parallel": parallel}


def drafts_per_prompt(options: Any) -> int:
    """How many drafts a shipped strategy makes; used for the plan's estimates alone."""
    return options.samples if options.name == "parallel" else options.rounds


def find_plug(known: dict[str, Any], name: str, field: str) -> Any:
    """A plug by its short name or by `module:Name`."""
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{field}: {name!r} cannot be loaded: {error}") from None
