"""Reads tables from JSONL, JSON, Parquet or `datasets`, row by row; every fault is named by file and line."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evolve_ray.errors import UserError

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
