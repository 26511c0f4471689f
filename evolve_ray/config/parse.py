"""Strict reading: a TOML tree becomes frozen dataclasses, or one error that names the wrong option and its line."""

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from typing import Any

from evolve_ray.errors import UserError


class Reader:
    """Turns a parsed TOML tree into dataclasses; its errors name the line of the file, or the command line."""

    def __init__(self, where: str, text: str, overridden: set[str]):
        self.where = where
        self.text = text
        self.overridden = overridden

    def fail(self, dotted: str, message: str) -> typing.NoReturn:
        """Raises `UserError` with the place of an option, its dotted name and the message."""
        if any(dotted == key or dotted.startswith(key + ".") for key in self.overridden):
            place = "command line"
        else:
            line = find_line(self.text, dotted)
            place = f"{self.where}:{line}" if line else self.where
        raise UserError(f"{place}: {dotted}: {message}")

    def build(self, cls: type, tree: Any, dotted: str = "") -> Any:
        """The dataclass `cls` from a table, with its inner tables; `dotted` is the name of the table."""
        if not isinstance(tree, dict):
            self.fail(dotted, f"is {describe(tree)}, but must be a table of options")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in tree:
            if key not in fields:
                nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"the options here are {', '.join(fields)}"
                self.fail(join(dotted, key), f"unknown option; {hint}")
        hints = typing.get_type_hints(cls)
        values = {}
        for name, field in fields.items():
            if name in tree:
                values[name] = self.value(hints[name], field, tree[name], join(dotted, name))
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                meaning = f" ({field.metadata['text']})" if "text" in field.metadata else ""
                self.fail(join(dotted, name), f"is missing and has no default{meaning}; add it to the recipe or as key=value")
        return cls(**values)

    def value(self, hint: Any, field: dataclasses.Field, value: Any, dotted: str) -> Any:
        """The value of an option after all checks of its type, bounds and choices; a table becomes its dataclass."""
        if isinstance(hint, types.UnionType):
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        if dataclasses.is_dataclass(hint):
            return self.build(typing.cast(type, hint), value, dotted)
        if typing.get_origin(hint) is dict:
            return self.build_named(typing.get_args(hint)[1], value, dotted)
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not hint:
            self.fail(dotted, f"is {describe(value)}, but must be {NAMES[hint]} ({field.metadata['text']})")
        bounds = field.metadata
        if isinstance(value, float) and not math.isfinite(value):
            self.fail(dotted, f"is not a finite number ({bounds['text']})")
        if isinstance(value, dict):
            self.check_free(value, dotted)
        if bounds["low"] is not None and value < bounds["low"]:
            self.fail(dotted, f"is {value}, but must be at least {bounds['low']} ({bounds['text']})")
        if bounds["above"] is not None and value <= bounds["above"]:
            self.fail(dotted, f"is {value}, but must be above {bounds['above']} ({bounds['text']})")
        if bounds["high"] is not None and value > bounds["high"]:
            self.fail(dotted, f"is {value}, but must be at most {bounds['high']} ({bounds['text']})")
        is_plug = bounds["plug"] and re.fullmatch(r"[\w.]+:\w+", str(value))
        if bounds["choices"] and value not in bounds["choices"] and not is_plug:
            nearest = difflib.get_close_matches(value, bounds["choices"], n=1)
            allowed = f"one of {', '.join(bounds['choices'])}" + (" or module:Name" if bounds["plug"] else "")
            self.fail(dotted, f"is {value!r}, but must be {allowed}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
        return value

    def build_named(self, cls: type, tree: Any, dotted: str) -> dict[str, Any]:
        """Tables of one kind by the names that the recipe gives them."""
        if not isinstance(tree, dict):
            self.fail(dotted, f"is {describe(tree)}, but must be tables with names of your own, [{dotted}.NAME]")
        for name in tree:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                self.fail(join(dotted, name), "the name must be of small letters, digits and _, a letter first; rename it")
        return {name: self.build(cls, part, join(dotted, name)) for name, part in tree.items()}

    def check_free(self, value: Any, dotted: str) -> None:
        """A table that is passed on to a library may only hold values of JSON, since it is stored in config.json."""
        if isinstance(value, dict):
            for key, part in value.items():
                self.check_free(part, join(dotted, key))
        elif isinstance(value, list):
            for part in value:
                self.check_free(part, dotted)
        elif type(value) not in (str, int, bool, float):
            self.fail(dotted, f"is a {type(value).__name__}, but must be a string, number, true or false, list or table")
        elif isinstance(value, float) and not math.isfinite(value):
            self.fail(dotted, "is not a finite number")


NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "a table", list: "a list"}


def describe(value: Any) -> str:
    return f"{value!r} ({NAMES.get(type(value), type(value).__name__)})"


def join(dotted: str, key: str) -> str:
    return f"{dotted}.{key}" if dotted else key


def find_line(text: str, dotted: str) -> int:
    """The line that sets `dotted`, or else that of its nearest enclosing table; 0 if there is none."""
    section, table_line = "", 0
    for number, line in enumerate(text.split("\n"), start=1):
        header = re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line)
        if header:
            section = header.group(1).replace(" ", "").replace('"', "")
            if dotted == section or dotted.startswith(section + "."):
                table_line = number
            continue
        key = re.match(r"\s*([\w\-.\"]+)\s*=", line)
        if key:
            full_name = join(section, key.group(1).replace('"', ""))
            if dotted == full_name or dotted.startswith(full_name + "."):
                return number
    return table_line


def parse_value(raw: str) -> Any:
    """A value in TOML syntax; any other text is a string."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def set_value(tree: dict, keys: list[str], value: Any) -> None:
    """Sets the value at dotted `keys`, and adds the tables on the way."""
    for depth, key in enumerate(keys[:-1]):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            name, value_name = ".".join(keys), ".".join(keys[: depth + 1])
            raise UserError(f"command line: {name}: {value_name} is a value, not a table; use a dotted name from --options")
    tree[keys[-1]] = value


def pattern_fault(pattern: str, has_column: bool) -> str:
    """What is wrong with an `answer_pattern`; "" if nothing is."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return f"is not a regular expression: {error}"
    if not groups:
        return r"has no group; put a group around the answer, for example '####\s*(.+)'"
    return "" if has_column else "has no column to read; set answer_column in the same table"
