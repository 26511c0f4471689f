"""Reads a recipe (TOML) or a stored configuration (JSON) into a `Config`, with `key=value` overrides."""

import json
import tomllib
from pathlib import Path

from evolve_ray.config.constraints import check_together
from evolve_ray.config.options import Config
from evolve_ray.config.parse import Reader, parse_value, set_value
from evolve_ray.errors import IntegrityError, UserError

# Tables that `TABLE=none` on the command line removes.
OPTIONAL = ("toy", "activation", "offline", "verifier", "refresh", "models")


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration of a recipe with `key=value` overrides (dotted keys; values in TOML syntax, or bare words).

    Raises `UserError` with the file, the line and the option for anything that is wrong.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; the shipped ones are in jobs/recipes/") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, but must be a recipe (a TOML file)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is not valid TOML: {error}") from None
    return build(tree, str(path), text, overrides)


def build(tree: dict, where: str, text: str, overrides: list[str] | tuple[str, ...]) -> Config:
    """The configuration of a parsed tree with overrides; `text` is the source of the tree, to find the lines of errors."""
    overridden = set()
    for item in overrides:
        key, equals, raw = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"command line: {item!r}: must have the form key=value, for example training.beta=0.2")
        overridden.add(key.strip())
        if key.strip() in OPTIONAL and raw.strip() == "none":
            tree.pop(key.strip(), None)
        else:
            set_value(tree, key.strip().split("."), parse_value(raw.strip()))

    reader = Reader(where, text, overridden)
    config = reader.build(Config, tree)
    check_together(config, reader)
    return config


def from_json(tree: dict, where: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration from the JSON that `resolved` wrote, in which absent tables are null."""
    return build({name: value for name, value in tree.items() if value is not None}, where, "", overrides)


def load_stored(run: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration that a run directory stores. Raises UserError if there is none, IntegrityError if it is damaged."""
    path = run / "config.json"
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; give the recipe with --recipe") from None
    except ValueError:
        raise IntegrityError(f"{path}: is damaged; give the recipe with --recipe") from None
    return from_json(values, str(path), overrides)
