"""The configuration as plain JSON values: for stage keys, for config.json, and to compare two configurations."""

import dataclasses
from typing import Any

from evolve_ray.config.parse import join


def resolved(part: Any, *, runtime: bool = True) -> Any:
    """A section as plain JSON values.

    `runtime=False` is for stage keys: it leaves out the runtime options, and the `later` options that have their defaults.
    """
    if isinstance(part, dict) and any(map(dataclasses.is_dataclass, part.values())):  # tables with names of their own
        return {name: resolved(value, runtime=runtime) for name, value in part.items()}
    if not dataclasses.is_dataclass(part):
        return part
    return {
        f.name: resolved(getattr(part, f.name), runtime=runtime)
        for f in dataclasses.fields(part)
        if runtime or not (f.metadata.get("runtime") or (f.metadata.get("later") and getattr(part, f.name) == default(f)))
    }


def default(field: dataclasses.Field) -> Any:
    """The default of an option."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, join(prefix, key))
        else:
            flat[join(prefix, key)] = value
    return flat
