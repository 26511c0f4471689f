"""One option: a field with one line that says what it is, its unit, its bounds and its default, all in one place.

Errors, docs/options.md and `jobs/iterate.py --options` are made from it.
"""

import dataclasses
from dataclasses import field
from typing import Any


def option(
    text: str,
    default: Any = dataclasses.MISSING,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    plug: bool = False,
    runtime: bool = False,
) -> Any:
    """A field with its bounds (`low`..`high` inclusive, `above` exclusive); `plug` also allows `module:Name`.

    `runtime` options change where and how fast a run computes, never what: they are in no stage's key and may differ when a
    run is resumed.
    """
    metadata = {
        "text": text, "unit": unit, "low": low, "high": high, "above": above, "choices": choices, "plug": plug,
        "runtime": runtime,
    }  # fmt: skip
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    """A table of options that is there with its defaults where a recipe leaves it out."""
    return field(default_factory=kind)
