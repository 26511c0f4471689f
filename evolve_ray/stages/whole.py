"""The second pass of a selection: over all rows of an iteration, with one shard in memory at a time."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evolve_ray.config import options
from evolve_ray.config.plugs import blame, find_plug, short, with_args
from evolve_ray.errors import UserError
from evolve_ray.select.check import used_drafts
from evolve_ray.select.pairs import reject_draft
from evolve_ray.select.whole import summary, top_share
from evolve_ray.stages.pair_table import PairWriter, row_groups
from evolve_ray.store import shards
from evolve_ray.store.manifest import Manifest

Whole = Callable[..., Any]


class Summaries:
    """The summaries of all rows of a table, read again for each loop over them, but for those that are left out."""

    def __init__(self, path: Path, left_out: dict[str, str]):
        self.path, self.left_out = path, left_out

    def __iter__(self) -> Iterator[dict]:
        for group in row_groups(self.path):
            yield from (summary(pair) for pair in group if pair["pair_id"] not in self.left_out)


def find_whole(settings: options.Selection) -> Whole | None:
    """The user's own function over all rows; None without one."""
    if not settings.whole:
        return None
    return with_args(
        "selection.whole_args", settings.whole, find_plug({}, settings.whole, "selection.whole"), settings.whole_args
    )


def choose(path: Path, settings: options.Selection) -> tuple[dict[str, str], dict[str, float]]:
    """(why a row is left out by its pair id, weights of the kept rows by pair id, empty without weights)."""
    left_out: dict[str, str] = {}
    weights: dict[str, float] = {}
    steps: list[tuple[str, str, Whole]] = []
    if settings.top_share < 1:
        steps.append(("selection.top_share", f"not among the top {settings.top_share:g} of the iteration", top_share))
    own = find_whole(settings)
    if own:
        steps.append(("selection.whole", f"left out by {settings.whole}", own))
    for field, why, function in steps:
        rows, place = Summaries(path, dict(left_out)), f"{field}: {settings.whole!r}"
        with blame(field, settings.whole):
            kept = function(rows, settings)
        if not isinstance(kept, set | list | tuple | dict):
            raise UserError(f"{place} returned {short(repr(kept))}, but must return pair ids, or weights by pair id")
        ids = {row["pair_id"] for row in rows}
        for pair_id in kept:
            if pair_id not in ids:
                raise UserError(f"{place} returned {short(repr(pair_id))}, which is the id of no row")
        weights = check_weights(place, kept) if isinstance(kept, dict) else {}
        left_out |= dict.fromkeys(ids - set(kept), f"its pair is {why} ({field})")
    return left_out, weights


def check_weights(place: str, weights: dict) -> dict[str, float]:
    for pair_id, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"{place} gave pair {pair_id} the weight {short(repr(weight))}, but must give a finite number")
    return weights


def narrow(writer: PairWriter, settings: options.Selection, prompts: Manifest, shard_prompts: int) -> tuple[list[dict], int]:
    """Leaves rows out of a written table; returns (rejected drafts that are now in no row, number of rows left out)."""
    everything = writer.path.with_name(".all.parquet")
    left_out, weights = choose(writer.path, settings)
    writer.path.rename(everything)
    rejected: list[dict] = []
    with contextlib.closing(PairWriter(writer.path, writer.schema, writer.selection)) as again:
        for shard, pairs in enumerate(row_groups(everything)):
            kept = [pair for pair in pairs if pair["pair_id"] not in left_out]
            again.write([weighted(pair, weights, settings.whole) for pair in kept])
            used = {draft_id for pair in kept for draft_id in used_drafts(pair)}
            lost = [(i, pair) for pair in pairs for i in sorted(used_drafts(pair) - used) if pair["pair_id"] in left_out]
            if lost:
                table = shards.read_slice(prompts.path("prompts.parquet"), shard, shard_prompts)
                prompt_of = {row["prompt_id"]: row for row in table}
                pair_of = dict(reversed(lost))  # of a draft in several rows: the first
                rejected += [
                    reject_draft(prompt_of[pair["prompt_id"]], {"draft_id": i}, left_out[pair["pair_id"]])
                    for i, pair in pair_of.items()
                ]
    everything.unlink()
    return rejected, len(left_out)


def weighted(pair: dict, weights: dict[str, float], name: str) -> dict:
    """The row with its weight as a number for the loss."""
    numbers = pair.get("numbers") or {}
    if not weights:
        return pair if numbers else {key: value for key, value in pair.items() if key != "numbers"}
    if "weight" in numbers:
        raise UserError(f"selection.whole: {name!r} gives weights, but the rows have the number 'weight' already; rename it")
    return pair | {"numbers": {**numbers, "weight": float(weights[pair["pair_id"]])}}
