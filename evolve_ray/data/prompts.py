"""Reads prompts and preference triples from JSONL, Parquet or `datasets`; every fault is named by file and line.

All faults of an input are collected (the first 20 are shown) before anything starts. Exact duplicates become one row and
are counted; nothing else is dropped here.
"""

from array import array
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from evolve_ray.data.read import answer_of, read_records, show, text_of
from evolve_ray.errors import UserError
from evolve_ray.store.rows import content_id, derive_seed, reject


def read_prompts(path: str, **columns: str) -> tuple[list[dict], list[dict]]:
    """Prompt rows (without `num_tokens`) in the file's order, and the rejected duplicates; see `scan_prompts`."""
    rejected: list[dict] = []
    return list(scan_prompts(path, rejected, **columns)), rejected


def scan_prompts(
    path: str,
    rejected: list[dict],
    *,
    prompt_column: str,
    answer_column: str = "",
    answer_pattern: str = "",
    id_column: str = "",
    draft_column: str = "",
    source_split: str = "train",
    split: str = "train",
) -> Iterator[dict]:
    """Prompt rows (without `num_tokens`) in the file's order; duplicates go to `rejected`, and faults are raised at the end.

    With `draft_column` a row also has its text as `draft`; of duplicates the first one's counts.
    """
    faults: list[str] = []
    lines: dict[str, int] = {}  # of each id
    texts: dict[str, str] = {}  # and what stands there, where the id does not say that itself
    for line, record in read_records(path, source_split, faults):
        where = f"{path}:{line}"
        prompt = text_of(record, prompt_column, where, faults)
        answer = text_of(record, answer_column, where, faults) if answer_column else None
        if answer_pattern and answer is not None:
            answer = answer_of(answer, answer_pattern, f"{where}: column {answer_column!r}", faults)
        draft = text_of(record, draft_column, where, faults) if draft_column else None
        given = text_of(record, id_column, where, faults) if id_column else None
        wanted = ((answer_column, answer), (id_column, given), (draft_column, draft))
        if prompt is None or any(column and text is None for column, text in wanted):
            continue
        text_id = content_id("prompt", prompt, answer)
        prompt_id = given or text_id
        row = {"prompt_id": prompt_id, "prompt": prompt, "answer": answer, "split": split, "file": path, "line": line}
        if prompt_id in lines:
            if given and texts[prompt_id] != text_id:
                faults.append(f"{where}: id {given!r} stands at line {lines[prompt_id]} too, with another text")
            rejected.append(reject(row, "prompts", f"duplicate of line {lines[prompt_id]}"))
            continue
        lines[prompt_id] = line
        if given:
            texts[prompt_id] = text_id
        yield {**row, "draft": draft} if draft_column else row
    if faults:
        raise show(path, faults)
    if not lines:
        raise UserError(f"{path}: holds no prompts; give a file with at least one row")


def fresh_order(prompt_ids: pa.ChunkedArray, *, seed: int) -> pa.Array:
    """Row numbers in the order in which a run takes its prompts: only their ids and the seed decide."""
    places = pa.array(array("q", (derive_seed("order", seed, prompt_id.as_py()) for prompt_id in prompt_ids)))
    keys = pa.table({"place": places, "prompt_id": prompt_ids})
    return pc.sort_indices(keys, sort_keys=[("place", "ascending"), ("prompt_id", "ascending")])


def fresh_slice(table: pa.Table, order: pa.Array, *, iteration: int, per_iteration: int) -> pa.Table:
    """The prompts of one iteration: disjoint from those of every other."""
    return table.take(order.slice((iteration - 1) * per_iteration, per_iteration)).combine_chunks()


def drop_held_out(rows: list[dict], held_out: dict[str, str]) -> tuple[list[dict], list[dict]]:
    """Training rows whose text is no evaluation prompt; `held_out` maps an evaluation prompt's text to its split."""
    kept = [row for row in rows if row["prompt"] not in held_out]
    rejected = [
        reject(row, "prompts", f"is also a prompt of evaluation split {held_out[row['prompt']]!r}")
        for row in rows
        if row["prompt"] in held_out
    ]
    return kept, rejected


def with_token_counts(rows: list[dict], count: Callable[[str], int], limit: int, *, field: str) -> tuple[list[dict], list[dict]]:
    """Adds `num_tokens` of the first ask; a prompt with more than `limit` tokens is rejected, never cut."""
    kept: list[dict] = []
    rejected: list[dict] = []
    for row in rows:
        num_tokens = count(row["prompt"])
        if num_tokens > limit:
            reason = f"prompt has {num_tokens} tokens, limit {limit} ({field})"
            rejected.append(reject(row, "prompts", reason, num_tokens=num_tokens, limit=limit))
        else:
            kept.append({**row, "num_tokens": num_tokens})
    return kept, rejected
