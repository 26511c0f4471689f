"""Checks the conservation law on committed tables: no row is lost, none occurs twice, all are in the order of the data.

prompts = generated + rejected; answers = scored + rejected; drafts = used + rejected; every member of a pair exists.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from evolve_ray.store import rows
from evolve_ray.store.manifest import Manifest

SHOWN = 5  # ids that a message lists
Inputs = dict[str, Manifest]


def check(manifest: Manifest, inputs: Inputs) -> Iterator[str]:
    """Yields every error in the rows of one committed stage; `inputs` are those of its inputs that the run still has."""
    check_stage = CHECKS.get(manifest.stage)
    if check_stage is None:
        return
    try:
        yield from check_stage(manifest, inputs)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        yield f"its tables cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def table_rows(manifest: Manifest, name: str) -> list[dict]:
    """Returns all rows of the table `name`, or of all shards of a sharded stage."""
    shards = sorted(file for file in manifest.files if file.endswith("/rows.parquet"))
    return [row for file in shards or [name] for row in rows.read_table(manifest.path(file))]


def rejected_rows(manifest: Manifest) -> list[dict]:
    return rows.read_jsonl(manifest.path("rejected.jsonl"))


def check_counts(manifest: Manifest, table: list[dict], rejected: list[dict]) -> Iterator[str]:
    """Yields an error for each count in the manifest that differs from the files."""
    for name, number in (("num_rows", len(table)), ("num_rejected", len(rejected))):
        if manifest.stats.get(name, number) != number:
            yield f"{name} is {manifest.stats[name]} in its manifest, but {number} in its files"


def duplicates(ids: Iterable[Any], what: str) -> Iterator[str]:
    """Yields an error if an id occurs twice."""
    seen: set = set()
    repeated = [name for name in ids if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if repeated:
        yield f"{len(repeated)} {what} occur twice: {first_ids(repeated)}"


def check_coverage(expected: list[str], present: list[str], rejected: list[str], what: str) -> Iterator[str]:
    """Yields an error unless each id of `expected` is either present or rejected, no other is, and the order is kept."""
    known, seen = set(expected), {*present, *rejected}
    for ids, problem in (
        ([name for name in expected if name not in seen], "are neither in the table nor rejected"),
        (sorted({*present} & {*rejected}), "are both in the table and rejected"),
        ([name for name in [*present, *rejected] if name not in known], "are not in its input"),
    ):
        if ids:
            yield f"{len(ids)} {what} {problem}: {first_ids(ids)}"
    position = {name: number for number, name in enumerate(expected)}
    positions = [position[name] for name in present if name in position]
    if positions != sorted(positions):
        yield f"its {what} are not in the order of its input"


def first_ids(ids: list[Any]) -> str:
    return ", ".join(map(str, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")


def check_prompts(manifest: Manifest, inputs: Inputs) -> Iterator[str]:
    table, rejected = table_rows(manifest, "prompts.parquet"), rejected_rows(manifest)
    yield from check_counts(manifest, table, rejected)
    yield from duplicates((row["prompt_id"] for row in table), "prompts")
    if manifest.stats["num_in"] != len(table) + len(rejected):
        yield f"{manifest.stats['num_in']} rows were read, but {len(table)} are in the table and {len(rejected)} rejected"


def check_generations(manifest: Manifest, inputs: Inputs) -> Iterator[str]:
    table, rejected = table_rows(manifest, ""), rejected_rows(manifest)
    yield from check_counts(manifest, table, rejected)
    yield from duplicates((row["draft_id"] for row in table), "drafts")
    if "prompts" in inputs:
        expected = [row["prompt_id"] for row in table_rows(inputs["prompts"], "prompts.parquet")]
        yield from check_coverage(expected, [row["prompt_id"] for row in table], [row["id"] for row in rejected], "prompts")


def check_scores(manifest: Manifest, inputs: Inputs) -> Iterator[str]:
    table, rejected = table_rows(manifest, ""), rejected_rows(manifest)
    yield from check_counts(manifest, table, rejected)
    yield from duplicates((row["draft_id"] for row in table), "scores")
    if "generations" in inputs:
        drafts = inputs["generations"]
        files = {file for file in manifest.files if file.endswith("/rows.parquet")}  # `labels` scores the first shards alone
        answers = [row for file in sorted(files & drafts.files.keys()) for row in rows.read_table(drafts.path(file))]
        expected = [row["draft_id"] for row in answers if row["kind"] == "answer"]
        yield from check_coverage(expected, [row["draft_id"] for row in table], [row["id"] for row in rejected], "drafts")


def check_pairs(manifest: Manifest, inputs: Inputs) -> Iterator[str]:
    table, rejected = table_rows(manifest, "pairs.parquet"), rejected_rows(manifest)
    yield from check_counts(manifest, table, rejected)
    yield from duplicates((row["pair_id"] for row in table), "pairs")
    stats = manifest.stats
    used = {row[member] for row in table for member in ("chosen_id", "rejected_id")} - {None}
    used |= {turn["draft_id"] for row in table for turn in row.get("turns") or ()} - {None}
    number = len(used) if "num_used" in stats else len(table)
    if stats["num_in"] != number + len(rejected):
        yield f"{stats['num_in']} rows were read, but {number} are used and {len(rejected)} rejected"
    if {"generations", "scores", "prompts"} <= inputs.keys():
        drafts = {row["draft_id"]: row for row in table_rows(inputs["generations"], "")}
        score = {row["draft_id"]: row["score"] for row in table_rows(inputs["scores"], "")}
        prompt = {row["prompt_id"]: row["prompt"] for row in table_rows(inputs["prompts"], "prompts.parquet")}
        for row in table:
            for side in ("chosen", "rejected"):
                draft = drafts.get(row[f"{side}_id"], {})
                pair_side = (row["prompt_id"], row[side], row[f"{side}_round"])
                if pair_side != tuple(draft.get(name) for name in ("prompt_id", "text", "round")):
                    yield f"the {side} response of pair {row['pair_id']} is not the draft {row[f'{side}_id']}"
                elif row.get(f"{side}_token_ids") != draft.get("token_ids"):
                    yield f"the {side} tokens of pair {row['pair_id']} are not those of the draft {row[f'{side}_id']}"
                elif side == "chosen" and row.get("chosen_logps") != draft.get("logps"):
                    yield f"the log-probabilities of pair {row['pair_id']} are not those of the draft {row['chosen_id']}"
                elif row[f"{side}_score"] is not None and row[f"{side}_score"] != score.get(row[f"{side}_id"]):
                    yield f"the {side} score of pair {row['pair_id']} is not the score of the draft {row[f'{side}_id']}"
            for turn in row.get("turns") or ():
                draft = drafts.get(turn["draft_id"], {"text": ""} if turn["draft_id"] is None else {})
                if any(turn[name] != draft.get(name) for name in ("text", "token_ids")):
                    yield f"the turn {turn['name']} of pair {row['pair_id']} is not the draft {turn['draft_id']}"
            if prompt.get(row["prompt_id"]) != row["prompt"]:
                yield f"the prompt of pair {row['pair_id']} is not the prompt {row['prompt_id']}"
        yield from check_order([row["prompt_id"] for row in table], list(prompt))


def check_mixed(manifest: Manifest, inputs: Inputs) -> Iterator[str]:
    table, origins = table_rows(manifest, "pairs.parquet"), table_rows(manifest, "origins.parquet")
    yield from check_counts(manifest, table, rejected_rows(manifest))
    yield from duplicates((row["pair_id"] for row in table), "pairs")
    if [row["pair_id"] for row in table] != [row["pair_id"] for row in origins]:
        yield "its origins are not those of its rows, in the same order"
    for kind in ("own", "replayed", "given"):
        number = sum(row["origin"] == kind for row in origins)
        if manifest.stats[f"num_{kind}"] != number:
            yield f"num_{kind} is {manifest.stats[f'num_{kind}']} in its manifest, but {number} in its files"
    sources = {(int(part.folder.parent.name[10:]), part.folder.name): part for part in inputs.values()}
    stored = {place: {row["pair_id"]: row for row in table_rows(part, "pairs.parquet")} for place, part in sources.items()}
    for row, origin in zip(table, origins, strict=False):
        place = (origin["iteration"], origin["table"])
        source = stored[place].get(row["pair_id"], {}) if place in stored else row
        if {name: value for name, value in row.items() if value is not None} != {
            name: value for name, value in source.items() if value is not None
        }:
            yield f"the row {row['pair_id']} is not that of {origin['table']} in iteration {origin['iteration']}"
    if "pairs" in inputs:
        own = [row["pair_id"] for row in table_rows(inputs["pairs"], "pairs.parquet")]
        if own != [row["pair_id"] for row in origins if row["origin"] == "own"]:
            yield "its own rows are not all pairs of the iteration, in the same order"


def check_order(ids: list[str], expected: list[str]) -> Iterator[str]:
    position = {name: number for number, name in enumerate(expected)}
    positions = [position.get(name, -1) for name in ids]
    if positions != sorted(positions):
        yield "its rows are not in the order of the prompts"


def check_reference(manifest: Manifest, inputs: Inputs) -> Iterator[str]:
    ids = [row["pair_id"] for row in table_rows(manifest, "reference.parquet")]
    yield from duplicates(ids, "pairs")
    if "pairs" in inputs and ids != [row["pair_id"] for row in table_rows(inputs["pairs"], "pairs.parquet")]:
        yield "its rows are not the pairs of its input, in the same order"


CHECKS = {
    "prompts": check_prompts,
    "generations": check_generations,
    "scores": check_scores,
    "pairs": check_pairs,
    "mixed": check_mixed,
    "reference": check_reference,
}
