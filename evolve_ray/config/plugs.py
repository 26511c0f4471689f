"""Loads a plug: one of this package by its short name, your own as `module:Name`."""

import importlib
from typing import Any

from evolve_ray.errors import UserError


def find_plug(plugs: dict[str, Any], name: str, field: str) -> Any:
    """The plug with a short name in `plugs`, or `module:Name`. Raises `UserError` with `field` if it cannot be loaded."""
    if name in plugs:
        return plugs[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{field}: {name!r} cannot be loaded: {error}; check the name and the Python path") from None
