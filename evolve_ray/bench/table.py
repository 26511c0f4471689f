"""Rows of a benchmark: a figure with its range, and counts that explain it."""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from evolve_ray.watch.progress import each


@dataclass(frozen=True)
class Row:
    """One figure. `values` are its repeats; `counts` hold the amount of work that was done."""

    name: str
    unit: str
    values: list[float]
    counts: dict[str, Any] = field(default_factory=dict)


def turns(name: str, number: int) -> Iterator[int]:
    """The numbers of the turns of a measurement; its progress is shown on a terminal, in a log on stderr."""
    return each(range(number), number, name, "turns", lambda line: print(line, file=sys.stderr, flush=True))


def as_json(row: Row) -> dict[str, Any]:
    figures = {"median": statistics.median(row.values), "low": min(row.values), "high": max(row.values)}
    return {"name": row.name, **figures, "unit": row.unit, "repeats": len(row.values), "counts": row.counts}


def as_text(rows: list[Row]) -> str:
    """Returns one line per row with median and range, followed by its counts."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        figures = as_json(row)
        shown = f"{figures['median']:.3g} {row.unit} [{figures['low']:.3g}, {figures['high']:.3g}] of {len(row.values)}"
        lines.append(f"{row.name:{width}}  {shown}")
        lines += [f"{'':{width}}    {name}: {value}" for name, value in row.counts.items()]
    return "\n".join(lines)
