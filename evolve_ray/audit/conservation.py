"""The conservation law over committed tables: no row lost, none twice, all in the order of the data.

prompts = generated + rejected; answers = scored + rejected; drafts = used + rejected; every member of a pair exists.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from evolve_ray.store import rows
from evolve_ray.store.manifest import Manifest

SHOWN = 5  # ids that a fault lists
Origins = dict[str, Manifest]


def check(manifest: Manifest, made_from: Origins) -> Iterator[str]:
    """Every fault of the rows of one committed stage; `made_from` are its inputs as far as they stand in the run."""
    tally = TALLIES.get(manifest.stage)
    if tally is None:
        return
    try:
        yield from tally(manifest, made_from)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        yield f"its tables cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def table(manifest: Manifest, name: str) -> list[dict]:
    """All rows of the table `name`, or of the shards of a sharded stage."""
    shards = sorted(file for file in manifest.files if file.endswith("/rows.parquet"))
    return [row for file in shards or [name] for row in rows.read_table(manifest.path(file))]


def rejected(manifest: Manifest) -> list[dict]:
    return rows.read_jsonl(manifest.path("rejected.jsonl"))


def counted(manifest: Manifest, found: list[dict], lost: list[dict]) -> Iterator[str]:
    """The manifest's counts are those of the files."""
    for name, number in (("num_rows", len(found)), ("num_rejected", len(lost))):
        if manifest.stats.get(name, number) != number:
            yield f"its manifest says {name} {manifest.stats[name]}, but its files hold {number}"


def twice(ids: Iterable[Any], what: str) -> Iterator[str]:
    seen: set = set()
    doubled = [name for name in ids if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if doubled:
        yield f"{len(doubled)} {what} stand there twice: {listed(doubled)}"


def covers(wanted: list[str], found: list[str], lost: list[str], what: str) -> Iterator[str]:
    """Every one of `wanted` is found or rejected, none both, no other, and the found ones are in order."""
    known, told = set(wanted), {*found, *lost}
    for names, fault in (
        ([name for name in wanted if name not in told], "are neither there nor rejected"),
        (sorted({*found} & {*lost}), "are there and rejected too"),
        ([name for name in [*found, *lost] if name not in known], "were not in what it was made from"),
    ):
        if names:
            yield f"{len(names)} {what} {fault}: {listed(names)}"
    place = {name: number for number, name in enumerate(wanted)}
    order = [place[name] for name in found if name in place]
    if order != sorted(order):
        yield f"its {what} are not in the order of what it was made from"


def listed(names: list[Any]) -> str:
    return ", ".join(map(str, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")


def prompts(manifest: Manifest, made_from: Origins) -> Iterator[str]:
    found, lost = table(manifest, "prompts.parquet"), rejected(manifest)
    yield from counted(manifest, found, lost)
    yield from twice((row["prompt_id"] for row in found), "prompts")
    if manifest.stats["num_in"] != len(found) + len(lost):
        yield f"{manifest.stats['num_in']} rows went in, but {len(found)} are there and {len(lost)} rejected"


def generations(manifest: Manifest, made_from: Origins) -> Iterator[str]:
    found, lost = table(manifest, ""), rejected(manifest)
    yield from counted(manifest, found, lost)
    yield from twice((row["draft_id"] for row in found), "drafts")
    if "prompts" in made_from:
        wanted = [row["prompt_id"] for row in table(made_from["prompts"], "prompts.parquet")]
        yield from covers(wanted, [row["prompt_id"] for row in found], [row["id"] for row in lost], "prompts")


def scores(manifest: Manifest, made_from: Origins) -> Iterator[str]:
    found, lost = table(manifest, ""), rejected(manifest)
    yield from counted(manifest, found, lost)
    yield from twice((row["draft_id"] for row in found), "scores")
    if "generations" in made_from:
        drafts = made_from["generations"]
        files = {file for file in manifest.files if file.endswith("/rows.parquet")}  # labels: of the first shards alone
        answers = [row for file in sorted(files & drafts.files.keys()) for row in rows.read_table(drafts.path(file))]
        wanted = [row["draft_id"] for row in answers if row["kind"] == "answer"]
        yield from covers(wanted, [row["draft_id"] for row in found], [row["id"] for row in lost], "drafts")


def pairs(manifest: Manifest, made_from: Origins) -> Iterator[str]:
    found, lost = table(manifest, "pairs.parquet"), rejected(manifest)
    yield from counted(manifest, found, lost)
    yield from twice((row["pair_id"] for row in found), "pairs")
    stats = manifest.stats
    used = {row[member] for row in found for member in ("chosen_id", "rejected_id")} - {None}
    number = len(used) if "num_used" in stats else len(found)
    if stats["num_in"] != number + len(lost):
        yield f"{stats['num_in']} rows went in, but {number} are used and {len(lost)} rejected"
    if {"generations", "scores", "prompts"} <= made_from.keys():
        drafts = {row["draft_id"]: row for row in table(made_from["generations"], "")}
        score = {row["draft_id"]: row["score"] for row in table(made_from["scores"], "")}
        prompt = {row["prompt_id"]: row["prompt"] for row in table(made_from["prompts"], "prompts.parquet")}
        for row in found:
            for side in ("chosen", "rejected"):
                draft = drafts.get(row[f"{side}_id"], {})
                told = (row["prompt_id"], row[side], row[f"{side}_round"])
                if told != tuple(draft.get(name) for name in ("prompt_id", "text", "round")):
                    yield f"the {side} answer of pair {row['pair_id']} is not the draft {row[f'{side}_id']}"
                elif row[f"{side}_score"] is not None and row[f"{side}_score"] != score.get(row[f"{side}_id"]):
                    yield f"the {side} score of pair {row['pair_id']} is not that of the draft {row[f'{side}_id']}"
            if prompt.get(row["prompt_id"]) != row["prompt"]:
                yield f"the prompt of pair {row['pair_id']} is not prompt {row['prompt_id']}"
        yield from order_of([row["prompt_id"] for row in found], list(prompt))


def order_of(found: list[str], wanted: list[str]) -> Iterator[str]:
    place = {name: number for number, name in enumerate(wanted)}
    order = [place.get(name, -1) for name in found]
    if order != sorted(order):
        yield "its rows are not in the order of the prompts"


def reference(manifest: Manifest, made_from: Origins) -> Iterator[str]:
    found = [row["pair_id"] for row in table(manifest, "reference.parquet")]
    yield from twice(found, "pairs")
    if "pairs" in made_from and found != [row["pair_id"] for row in table(made_from["pairs"], "pairs.parquet")]:
        yield "its rows are not the pairs that it was made from, in their order"


TALLIES = {"prompts": prompts, "generations": generations, "scores": scores, "pairs": pairs, "reference": reference}
