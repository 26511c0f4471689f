"""Loads a plug: one of this package by its short name, any other as `module:Name`."""

import importlib
from typing import Any

from evolve_ray.errors import UserError


def find_plug(known: dict[str, Any], name: str, field: str) -> Any:
    """A plug by its short name or by `module:Name`."""
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{field}: {name!r} cannot be loaded: {error}") from None
