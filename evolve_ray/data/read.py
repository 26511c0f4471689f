"""Reads tables from JSONL, JSON, Parquet or `datasets`, row by row; every fault is reported with its file and line."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evolve_ray.errors import UserError

SURROGATE = re.compile("[\ud800-\udfff]")
MAX_SHOWN = 20
BLOCK_ROWS = 4096  # rows that are in memory as dicts at the same time


def read_records(path: str, split: str, faults: list[str]) -> Iterator[tuple[int, dict]]:
    """Yields (line or row number from 1, record) of a JSONL file, a JSON list, a Parquet file, or a `datasets` name or folder.

    Appends the fault of each unusable line to `faults`. Raises UserError if the whole file or dataset cannot be read.
    """
    file = Path(path)
    if path.endswith((".jsonl", ".json", ".parquet")) and not file.exists():
        raise UserError(f"{path}: no such file; use the path of a JSONL, JSON or Parquet file, or a datasets name")
    if file.is_file() and path.endswith(".parquet"):
        yield from enumerate(read_parquet(file), start=1)
    elif is_json_list(file):
        yield from read_json_list(file, faults)
    elif file.is_file():
        yield from read_jsonl(file, faults)
    else:
        yield from enumerate(read_dataset(path, split), start=1)


def read_parquet(file: Path) -> Iterator[dict]:
    """Yields the rows of a Parquet file; one batch is in memory at a time."""
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=BLOCK_ROWS):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a Parquet file: {error}; check the file") from None


def read_jsonl(file: Path, faults: list[str]) -> Iterator[tuple[int, dict]]:
    """Yields (line from 1, record) of a file with one JSON object a line."""
    with open(file, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                record = json.loads(
                    raw.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=refuse_constant, parse_float=finite_float
                )
            except UnicodeDecodeError as error:
                faults.append(f"{file}:{number}: is not UTF-8 at byte {error.start} of the line")
                continue
            except (ValueError, RecursionError) as error:
                faults.append(f"{file}:{number}: is not a JSON object: {error}")
                continue
            if not isinstance(record, dict):
                faults.append(f"{file}:{number}: is a JSON {type(record).__name__}, but must be a JSON object")
                continue
            yield number, record


def is_json_list(file: Path) -> bool:
    """Whether a .json file is one list, as in AlpacaEval; otherwise each of its lines is a record."""
    if file.suffix != ".json" or not file.is_file():
        return False
    with open(file, "rb") as data:
        return data.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_json_list(file: Path, faults: list[str]) -> Iterator[tuple[int, dict]]:
    """Yields (position from 1, record) of a file that is one JSON list of objects."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        records = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant, parse_float=finite_float)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not a valid JSON list: {error}") from None
    for number, record in enumerate(records, start=1):
        if isinstance(record, dict):
            yield number, record
        else:
            faults.append(f"{file}:{number}: is a JSON {type(record).__name__}, but must be a JSON object")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("an object has the same key twice")
    return record


class Written(float):
    """A number with a fraction, which keeps the characters that the file has for it."""

    text: str


def finite_float(text: str) -> Written:
    value = Written(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a float")
    value.text = text
    return value


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def read_dataset(path: str, split: str) -> Iterator[dict]:
    """Yields the rows of a `datasets` name (`owner/name` or `owner/name:config`) or folder."""
    import datasets

    name, _, subset = path.partition(":")
    try:
        if Path(name, "dataset_info.json").exists() or Path(name, "dataset_dict.json").exists():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # `datasets` raises many types, all of them about this name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: is not a file, and `datasets` cannot load it (split {split!r}): {reason}") from None
    yield from data


def text_of(record: dict, column: str, where: str, faults: list[str], *, empty: bool = False) -> str | None:
    """The string in `column`; a number becomes the characters that the file has for it.

    Appends a fault and returns None if there is no usable text. A float of a Parquet file or of `datasets` is a fault: how it was
    written is lost (12 may have become 12.0), and a missing value may have become NaN.
    """
    if column not in record:
        columns = ", ".join(map(str, record)) or "none"
        faults.append(f"{where}: has no column {column!r}; its columns are: {columns}")
        return None
    value = record[column]
    if isinstance(value, Written):
        value = value.text
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, float):
        faults.append(f"{where}: column {column!r} is a float ({value!r}), so how it was written is lost; store it as a string")
        return None
    if not isinstance(value, str):
        faults.append(f"{where}: column {column!r} is {type(value).__name__}, but must be a string")
        return None
    if not empty and not value.strip():
        faults.append(f"{where}: column {column!r} is empty")
        return None
    if SURROGATE.search(value):
        faults.append(f"{where}: column {column!r} contains half of a surrogate pair, which is not valid Unicode text")
        return None
    return value


def answer_of(text: str, pattern: str, where: str, faults: list[str]) -> str | None:
    """The first group of the last match of `pattern`. Appends a fault and returns None if it is empty or nothing matches."""
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
    """Whether the first row of a table has `column`."""
    for _, record in read_records(path, split, []):
        return column in record
    return False


def faults_error(path: str, faults: list[str]) -> UserError:
    """The error that lists the faults of a file: the first `MAX_SHOWN` of them."""
    shown = "; ".join(faults[:MAX_SHOWN])
    more = f"; and {len(faults) - MAX_SHOWN} more" if len(faults) > MAX_SHOWN else ""
    plural = "s" if len(faults) > 1 else ""
    return UserError(f"{path}: {len(faults)} unusable row{plural}: {shown}{more}")


def count_rows(path: str) -> int | None:
    """The number of rows of a local file; None for a `datasets` name or folder, which must be loaded to be counted."""
    file = Path(path)
    if path.endswith((".jsonl", ".json", ".parquet")) and not file.exists():
        raise UserError(f"{path}: no such file; use the path of a JSONL, JSON or Parquet file, or a datasets name")
    if not file.is_file():
        return None
    if path.endswith(".parquet"):
        return pq.read_metadata(file).num_rows
    if is_json_list(file):
        return sum(1 for _ in read_json_list(file, []))
    with open(file, "rb") as lines:
        return sum(1 for line in lines if line.strip())
