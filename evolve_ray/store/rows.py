"""The rows that stages exchange: schemas, content ids, seeds, and typed Parquet.

Ids are content hashes and seeds derive from (run seed, iteration, row id): never from order, process or `hash()`.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PROMPT = pa.schema(
    [
        ("prompt_id", pa.string()),  # content hash of the prompt, or the user's id
        ("prompt", pa.string()),
        ("answer", pa.string()),  # null where there is no checkable answer
        ("split", pa.string()),  # "train" or the name of an evaluation split
        ("file", pa.string()),
        ("line", pa.int64()),  # 1-based line (JSONL) or row (other formats)
        ("num_tokens", pa.int64()),  # tokens of the first ask, the template's included
    ]
)
PROMPT_WITH_DRAFT = PROMPT.append(pa.field("draft", pa.string()))  # a first draft that is not the model's own
GENERATION = pa.schema(
    [
        ("draft_id", pa.string()),
        ("prompt_id", pa.string()),
        ("split", pa.string()),
        ("sample", pa.int64()),  # which independent sample or chain, from 0
        ("round", pa.int64()),  # y1 is round 1
        ("kind", pa.string()),  # "answer", "critique" for a step on the way to one, "skipped" for a round that was left out
        ("parent_id", pa.string()),  # the draft that this one refines, or that ended its chain; null in round 1
        ("text", pa.string()),  # empty where the round was left out
        ("finish_reason", pa.string()),  # "stop", "length" for a cut answer; "unchanged" or "right" where it was left out
        ("num_prompt_tokens", pa.int64()),
        ("num_tokens", pa.int64()),
        ("seed", pa.int64()),  # null for a draft that came with its prompt, and for a round that was left out
        ("model", pa.string()),  # content hash of the model that wrote it; null likewise
    ]
)
SCORE = pa.schema(
    [
        ("draft_id", pa.string()),
        ("prompt_id", pa.string()),
        ("score", pa.float64()),
        ("correct", pa.float64()),  # the verifier's value, 1.0 = exactly right; null without a verifier
    ]
)
PAIR = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_finished", pa.bool_()),  # false: cut by length, so no end token is trained
        ("rejected_finished", pa.bool_()),
        ("chosen_id", pa.string()),  # drafts; null for given pairs
        ("rejected_id", pa.string()),
        ("chosen_round", pa.int64()),
        ("rejected_round", pa.int64()),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
    ]
)

# Sums of log-probabilities over response tokens under the reference policy; null where the objective needs none.
REFERENCE = pa.schema(
    [("pair_id", pa.string())]
    + [
        (name, pa.float64())
        for name in (
            "chosen",  # log pi_ref(y_w | x)
            "rejected",  # log pi_ref(y_l | x)
            "chosen_after_rejected",  # log pi_ref(y_w | x, y_l, z)
            "rejected_after_rejected",  # log pi_ref(y_l | x, y_l, z)
            "chosen_after_chosen",  # log pi_ref(y_w | x, y_w, z)
            "rejected_after_chosen",  # log pi_ref(y_l | x, y_w, z)
        )
    ]
)


def canonical(value: Any) -> bytes:
    """One JSON spelling for one value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(
        "utf-8", "surrogatepass"
    )


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def content_id(*parts: Any) -> str:
    """A 16-digit id from content alone."""
    return digest(list(parts))[:16]


def derive_seed(*parts: Any) -> int:
    """A seed in [0, 2**31) from content alone; vLLM and NumPy take it as it is."""
    return int(digest(list(parts))[:12], 16) % 2**31


def write_table(path: Path, rows: list[dict] | pa.Table, schema: pa.Schema, *, group_rows: int | None = None) -> None:
    """Writes `rows` as one Parquet file, in row groups of `group_rows`; the same rows give the same bytes."""
    if not isinstance(rows, pa.Table):
        names = set(schema.names)
        for row in rows[:1]:
            assert set(row) == names, f"row has {sorted(set(row) ^ names)} too many or too few for the schema"
        rows = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(rows, path, compression="zstd", row_group_size=group_rows)


def read_table(path: Path) -> list[dict]:
    """All rows of one Parquet file, in the file's order."""
    return pq.read_table(path).to_pylist()


def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    """Writes one line a row, as they come; returns their number."""
    number = 0
    with open(path, "wb") as file:
        for number, row in enumerate(rows, start=1):  # noqa: B007 (the last one is what counts)
            file.write(canonical(row) + b"\n")
    return number


def read_jsonl(path: Path) -> list[dict]:
    with open(path, "rb") as file:
        return [json.loads(line) for line in file]


def reject(row: dict, stage: str, reason: str, **more: Any) -> dict:
    """The record of an input row that is not used; goes to `rejected.jsonl`."""
    return {
        "id": row.get("prompt_id") or row.get("id"),
        "file": row.get("file"),
        "line": row.get("line"),
        "stage": stage,
        "reason": reason,
        **more,
    }
