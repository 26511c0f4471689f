"""An option: a dataclass field with its description, unit, bounds and default in one place.

Errors, docs/options.md and `jobs/iterate.py --options` use them.
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
    later: bool = False,
) -> Any:
    """A field with its bounds (`low` and `high` inclusive, `above` exclusive); `plug` also allows `module:Name`.

    A `runtime` option changes where and how fast a run computes, but not its results: it is in no stage key and may change when
    a run is resumed. A `later` option was added after 0.1.0: at its default it is left out of stage keys, so that older runs
    continue.
    """
    metadata = {
        "text": text, "unit": unit, "low": low, "high": high, "above": above, "choices": choices, "plug": plug,
        "runtime": runtime, "later": later,
    }  # fmt: skip
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    """A table of options; it has its defaults if a recipe leaves it out."""
    return field(default_factory=kind)
