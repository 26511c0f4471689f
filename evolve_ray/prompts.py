"""Reads prompts and preference triples from JSONL, Parquet or `datasets`; every fault is named by file and line.

All faults of an input are collected (the first 20 are shown) before anything starts. Exact duplicates become one row and
are counted; nothing else is dropped here.
"""

import json
import math
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evolve_ray.errors import UserError
from evolve_ray.rows import content_id, derive_seed, reject

MAX_SHOWN = 20
BLOCK_ROWS = 4096  # rows that are dicts at a time where a table is read piece by piece


def read_records(path: str, split: str, faults: list[str]) -> Iterator[tuple[int, dict]]:
    """Yields (line, record) of a JSONL file, a JSON list, a Parquet file, or a `datasets` folder or name."""
    file = Path(path)
    if path.endswith((".jsonl", ".json", ".parquet")) and not file.exists():
        raise UserError(f"{path}: no such file; give the path of a JSONL or Parquet file, or a datasets name")
    if file.is_file() and path.endswith(".parquet"):
        yield from enumerate(read_parquet(file), start=1)
    elif is_json_list(file):
        yield from read_json_list(file, faults)
    elif file.is_file():
        yield from read_jsonl(file, faults)
    else:
        yield from enumerate(read_dataset(path, split), start=1)


def read_parquet(file: Path) -> Iterator[dict]:
    """The rows of a Parquet file, a batch of them in memory at a time."""
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=BLOCK_ROWS):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: is no readable Parquet file: {error}") from None


def read_jsonl(file: Path, faults: list[str]) -> Iterator[tuple[int, dict]]:
    with open(file, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                record = json.loads(
                    raw.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=no_constant, parse_float=finite
                )
            except UnicodeDecodeError as error:
                faults.append(f"{file}:{number}: is not UTF-8 at byte {error.start} of the line")
                continue
            except (ValueError, RecursionError) as error:
                faults.append(f"{file}:{number}: is not a JSON object: {error}")
                continue
            if not isinstance(record, dict):
                faults.append(f"{file}:{number}: is a JSON {type(record).__name__}, but must be an object")
                continue
            yield number, record


def is_json_list(file: Path) -> bool:
    """Whether a .json file is one list, as AlpacaEval's files are; else each of its lines is a record."""
    if file.suffix != ".json" or not file.is_file():
        return False
    with open(file, "rb") as data:
        return data.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_json_list(file: Path, faults: list[str]) -> Iterator[tuple[int, dict]]:
    """Yields (position from 1, record) of a file that is one JSON list of objects."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        records = json.loads(text, object_pairs_hook=unique_keys, parse_constant=no_constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is no JSON list: {error}") from None
    for number, record in enumerate(records, start=1):
        if isinstance(record, dict):
            yield number, record
        else:
            faults.append(f"{file}:{number}: is a JSON {type(record).__name__}, but must be an object")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return record


def finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is beyond every float")
    return value


def no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def read_dataset(path: str, split: str) -> Iterator[dict]:
    """Rows of a `datasets` name (`owner/name` or `owner/name:config`) or folder; this imports `datasets`."""
    import datasets

    name, _, subset = path.partition(":")
    try:
        if Path(name, "dataset_info.json").exists() or Path(name, "dataset_dict.json").exists():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the library raises a dozen kinds, all of them about this name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: is neither a file nor a dataset that can be loaded (split {split!r}): {reason}") from None
    yield from data


def text_of(record: dict, column: str, where: str, faults: list[str], *, empty: bool = False) -> str | None:
    """The string in `column`; None, with a fault noted, where there is none."""
    if column not in record:
        known = ", ".join(map(str, record)) or "none"
        faults.append(f"{where}: has no column {column!r}; its columns are: {known}")
        return None
    value = record[column]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        faults.append(f"{where}: column {column!r} is {type(value).__name__}, but must be a string")
        return None
    if not empty and not value.strip():
        faults.append(f"{where}: column {column!r} is empty")
        return None
    if any("\ud800" <= character <= "\udfff" for character in value):
        faults.append(f"{where}: column {column!r} holds half of a surrogate pair, which is no Unicode text")
        return None
    return value


def answer_of(text: str, pattern: str, where: str, faults: list[str]) -> str | None:
    """The answer that `pattern` finds in a text: the first group of its last match; None, with a fault noted, without one."""
    match = None
    for match in re.finditer(pattern, text):  # noqa: B007 (the last one is what counts)
        pass
    answer = (match[1] or "").strip() if match else ""
    if not answer:
        shown = text if len(text) <= 60 else f"...{text[-60:]}"
        faults.append(f"{where} has no match of answer_pattern {pattern!r} with an answer in its first group: {shown!r}")
        return None
    return answer


def has_column(path: str, column: str, split: str) -> bool:
    """Whether the first row of a table of prompts has `column`."""
    for _, record in read_records(path, split, []):
        return column in record
    return False


def show(path: str, faults: list[str]) -> UserError:
    shown = "; ".join(faults[:MAX_SHOWN])
    more = f"; and {len(faults) - MAX_SHOWN} more" if len(faults) > MAX_SHOWN else ""
    plural = "s" if len(faults) > 1 else ""
    return UserError(f"{path}: {len(faults)} unusable row{plural}: {shown}{more}")


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


def read_triples(
    path: str, *, prompt_column: str, chosen_column: str, rejected_column: str, source_split: str = "train", limit: int = 0,
    held_out: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Given preference triples as pair rows (both answers complete), in the file's order, and the rejected ones.

    Duplicates are rejected, and what `held_out` maps to its split: the text of an evaluation prompt.
    """
    faults: list[str] = []
    pairs: dict[str, dict] = {}
    dropped: list[dict] = []
    for line, record in read_records(path, source_split, faults):
        where = f"{path}:{line}"
        prompt = text_of(record, prompt_column, where, faults)
        chosen = text_of(record, chosen_column, where, faults)
        rejected = text_of(record, rejected_column, where, faults)
        if prompt is None or chosen is None or rejected is None:
            continue
        pair_id = content_id("pair", prompt, chosen, rejected)
        if prompt in held_out:
            row = {"id": pair_id, "file": path, "line": line}
            dropped.append(reject(row, "pairs", f"is on a prompt of evaluation split {held_out[prompt]!r}"))
        elif pair_id in pairs:
            dropped.append(reject({"id": pair_id, "file": path, "line": line}, "pairs", "duplicate"))
        elif not limit or len(pairs) < limit:
            pairs[pair_id] = {
                "pair_id": pair_id,
                "prompt_id": content_id("prompt", prompt, None),
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "chosen_finished": True,
                "rejected_finished": True,
                "chosen_id": None,
                "rejected_id": None,
                "chosen_round": None,
                "rejected_round": None,
                "chosen_score": None,
                "rejected_score": None,
            }
        else:
            dropped.append(reject({"id": pair_id, "file": path, "line": line}, "pairs", f"beyond the limit of {limit}"))
    if faults:
        raise show(path, faults)
    if not pairs and dropped:
        raise UserError(f"{path}: all {len(dropped)} preference triples are on prompts of evaluation splits; give others")
    if not pairs:
        raise UserError(f"{path}: holds no preference triples; give a file with at least one row")
    return list(pairs.values()), dropped


def count_rows(path: str) -> int | None:
    """Rows of a local file without reading them into memory; None for what must be loaded to be counted."""
    file = Path(path)
    if path.endswith((".jsonl", ".json", ".parquet")) and not file.exists():
        raise UserError(f"{path}: no such file; give the path of a JSONL or Parquet file, or a datasets name")
    if not file.is_file():
        return None
    if path.endswith(".parquet"):
        return pq.read_metadata(file).num_rows
    if is_json_list(file):
        return sum(1 for _ in read_json_list(file, []))
    with open(file, "rb") as lines:
        return sum(1 for line in lines if line.strip())


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
