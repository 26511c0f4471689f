"""One option: a field with its default, its bounds, and what it may be."""

import dataclasses
from dataclasses import field
from typing import Any


def option(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    plug: bool = False,
    runtime: bool = False,
) -> Any:
    """A field with its bounds (`low`..`high` inclusive, `above` exclusive); `plug` also allows `module:Name`."""
    metadata = {"low": low, "high": high, "above": above, "choices": choices, "plug": plug, "runtime": runtime}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
