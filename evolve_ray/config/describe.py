"""Writes every option as text, from the options themselves: for `jobs/iterate.py --options [TABLE]`, and for docs/options.md.

`python -m evolve_ray.config.describe > docs/options.md` writes that page again.
"""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any

from evolve_ray.config.options import Config
from evolve_ray.config.parse import NAMES
from evolve_ray.errors import UserError

HEAD = """\
# Options

Every option of a recipe. `python -m evolve_ray.config.describe > docs/options.md` writes this page from the options themselves.
On the command line `key=value` sets an option (`training.beta=0.2`), `TABLE=none` removes an optional table, and
`python jobs/iterate.py --options TABLE` prints a table. An option marked *runtime* changes where and how fast a run computes,
but not its results: it may change when a run is resumed. Where a plug is allowed, `module:Name` names your own, see
[extending.md](extending.md).
"""


def tables(kind: type = Config, dotted: str = "") -> list[tuple[str, type, bool]]:
    """(name, dataclass, whether a recipe may leave it out) of every table; the top level is first, with the name ""."""
    all_tables: list[tuple[str, type, bool]] = [(dotted, kind, False)] if not dotted else []
    for name, hint in typing.get_type_hints(kind).items():
        optional = isinstance(hint, types.UnionType)
        table = next((part for part in typing.get_args(hint) if part is not type(None)), hint) if optional else hint
        if typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            name, table, optional = f"{name}.NAME", typing.get_args(hint)[1], True
        if dataclasses.is_dataclass(table):
            full_name = f"{dotted}.{name}" if dotted else name
            all_tables += [(full_name, typing.cast(type, table), optional), *tables(typing.cast(type, table), full_name)]
    return all_tables


def options_of(kind: type) -> list[dataclasses.Field]:
    """The options of one table, without its inner tables."""
    return [field for field in dataclasses.fields(kind) if "text" in field.metadata]


def bounds(field: dataclasses.Field) -> str:
    """The allowed values as text: choices, or type and bounds."""
    metadata, hint = field.metadata, typing.cast(type, field.type)
    if metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in metadata["choices"]) + (", `module:Name`" if metadata["plug"] else "")
    limits = [f"{word} {metadata[name]:g}" for name, word in (("low", "at least"), ("above", "above"), ("high", "at most"))
              if metadata[name] is not None]  # fmt: skip
    return ", ".join([NAMES[hint], *limits])


def default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value: Any = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return json.dumps(value)


def describe(field: dataclasses.Field) -> str:
    """The text of an option, with its unit, and whether it is a runtime option."""
    notes = [field.metadata["unit"]] if field.metadata["unit"] else []
    notes += ["runtime"] if field.metadata["runtime"] else []
    return field.metadata["text"] + (f" ({', '.join(notes)})" if notes else "")


def as_text(wanted: str = "") -> str:
    """All tables, or the `wanted` one, for the terminal. Raises `UserError` for an unknown table."""
    by_name = {name: (kind, optional) for name, kind, optional in tables()}
    if wanted and wanted not in by_name:
        nearest = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the tables are {', '.join(filter(None, by_name))}"
        raise UserError(f"--options {wanted}: is not a table of a recipe; {hint}")
    parts = []
    for name in [wanted] if wanted else by_name:
        kind, optional = by_name[name]
        title = f"[{name}]{' (optional)' if optional else ''}" if name else "top level"
        lines = [f"{title}: {(kind.__doc__ or '').splitlines()[0]}"]
        for field in options_of(kind):
            lines += [f"  {field.name} = {default(field)}", f"      {describe(field)}", f"      {bounds(field).replace('`', '')}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def as_markdown() -> str:
    """The text of docs/options.md."""
    parts = [HEAD]
    written: dict[type, str] = {}
    for name, kind, optional in tables():
        title = f"`[{name}]`{', optional' if optional else ''}" if name else "Top level"
        if kind in written:
            parts.append(f"## {title}\n\nThe same options as `[{written[kind]}]`.\n")
            continue
        written[kind] = name
        doc = " ".join(line.strip() for line in (kind.__doc__ or "").splitlines()).strip()
        lines = [f"## {title}", "", doc, "", "| option | what it is | values | default |", "| --- | --- | --- | --- |"]
        for field in options_of(kind):
            value = default(field)
            cells = [f"`{field.name}`", describe(field), bounds(field), value if value == "required" else f"`{value}`"]
            lines.append(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in cells)} |")
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    print(as_markdown(), end="")
