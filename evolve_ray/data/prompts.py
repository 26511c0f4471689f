"""Reads prompts from JSONL, JSON, Parquet or `datasets`; every fault is reported with its file and line.

All faults of an input are collected (the first 20 are shown) before anything starts. Of exact duplicates the first row is kept
and the others are rejected. Also here: the order and the slices in which a run takes its prompts, and the rows it leaves out.
"""

import difflib
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from evolve_ray.data.read import answer_of, faults_error, read_records, text_of
from evolve_ray.data.shapes import Shape, read_prompt
from evolve_ray.errors import UserError
from evolve_ray.store.rows import canonical, content_id, derive_seed, reject
from evolve_ray.store.turns import Prompt, as_text


def read_prompts(path: str, **columns: Any) -> tuple[list[dict], list[dict]]:
    """Returns (prompt rows in the order of the file, rejected duplicates); see `scan_prompts` for the arguments."""
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
    columns: Sequence[str] = (),
    source_split: str = "train",
    split: str = "train",
    system: str = "",
    gold_fault: Callable[[str], str] | None = None,
    prompt_fault: Callable[[Prompt], str] | None = None,
    shape: Shape | None = None,
) -> Iterator[dict]:
    """Yields prompt rows (without `num_tokens`) in the order of the file; appends duplicates to `rejected`.

    A prompt without a system prompt gets `system`; `shape` counts what the prompts are. `gold_fault` and `prompt_fault` return
    what is wrong with a gold answer and with a prompt, "" if nothing is. With `draft_column` a row also has the text of that
    column as `draft`, with `columns` the JSON of those as `columns`; the first of several duplicates counts. Raises UserError at
    the end of the file, with all faults.
    """
    faults: list[str] = []
    shape = Shape() if shape is None else shape
    line_of: dict[str, int] = {}  # by prompt id
    text_id_of: dict[str, str] = {}  # by prompt id, only for ids from `id_column`: other ids are hashes of the text
    for line, record in read_records(path, source_split, faults):
        where = f"{path}:{line}"
        prompt = read_prompt(record, prompt_column, where, faults, shape, system=system)
        if prompt_fault and prompt is not None and (fault := prompt_fault(prompt)):
            faults.append(f"{where}: {fault}")
            prompt = None
        answer = text_of(record, answer_column, where, faults) if answer_column else None
        if answer_pattern and answer is not None:
            answer = answer_of(answer, answer_pattern, f"{where}: column {answer_column!r}", faults)
        if gold_fault and answer is not None and (fault := gold_fault(answer)):
            faults.append(f"{where}: {fault}")
            answer = None
        draft = text_of(record, draft_column, where, faults) if draft_column else None
        user_id = text_of(record, id_column, where, faults) if id_column else None
        further = cells_of(record, columns, where, faults) if columns else None
        cells = ((answer_column, answer), (id_column, user_id), (draft_column, draft), (columns, further))
        if prompt is None or any(column and text is None for column, text in cells):
            continue
        text_id = content_id("prompt", prompt, answer)
        prompt_id = user_id or text_id
        row = {"prompt_id": prompt_id, "prompt": prompt, "answer": answer, "split": split, "file": path, "line": line}
        if prompt_id in line_of:
            if user_id and text_id_of[prompt_id] != text_id:
                faults.append(f"{where}: id {user_id!r} is also on line {line_of[prompt_id]}, with another text")
            rejected.append(reject(row, "prompts", f"duplicate of line {line_of[prompt_id]}"))
            continue
        line_of[prompt_id] = line
        if user_id:
            text_id_of[prompt_id] = text_id
        more = {"draft": draft} if draft_column else {}
        yield row | more | ({"columns": further} if columns else {})
    if faults:
        raise faults_error(path, faults)
    if not line_of:
        raise UserError(f"{path}: contains no prompts; use a file with at least one row")


def cells_of(record: dict, columns: Sequence[str], where: str, faults: list[str]) -> str | None:
    """The JSON of some columns of a row; None with a fault for each that it lacks, or that JSON cannot hold."""
    cells, before = {}, len(faults)
    for column in columns:
        if column not in record:
            nearest = difflib.get_close_matches(column, record, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"its columns are: {', '.join(record) or 'none'}"
            faults.append(f"{where}: has no column {column!r}; {hint}")
            continue
        try:
            canonical(record[column])
        except (TypeError, ValueError) as error:
            faults.append(f"{where}: column {column!r} cannot be written as JSON: {error}; convert it to a text or number")
        cells[column] = record[column]
    return None if len(faults) > before else canonical(cells).decode("utf-8", "surrogatepass")


def fresh_order(prompt_ids: pa.ChunkedArray, *, seed: int) -> pa.Array:
    """Row numbers in the order in which a run takes its prompts. It depends on the prompt ids and the seed alone."""
    positions = pa.array(array("q", (derive_seed("order", seed, prompt_id.as_py()) for prompt_id in prompt_ids)))
    keys = pa.table({"position": positions, "prompt_id": prompt_ids})
    return pc.sort_indices(keys, sort_keys=[("position", "ascending"), ("prompt_id", "ascending")])


def order_again(table: pa.Table, order: pa.Array, *, seed: int, per_iteration: int, needed: int) -> pa.Array:
    """The order, with further passes over all prompts until there are `needed`, each in an order of its own.

    An iteration never has a prompt twice: those with which the last pass began the iteration come last in the next one. It must
    be no longer than a pass. Another `needed` changes only how far the order goes.
    """
    numbers, number = order.to_pylist(), 1
    while len(numbers) < needed:
        begun = set(numbers[len(numbers) - len(numbers) % per_iteration :])
        again = fresh_order(table["prompt_id"], seed=derive_seed("again", seed, number)).to_pylist()
        numbers += [row for row in again if row not in begun] + [row for row in again if row in begun]
        number += 1
    return pa.array(numbers, order.type)


def fresh_slice(table: pa.Table, order: pa.Array, *, iteration: int, per_iteration: int) -> pa.Table:
    """The prompts of one iteration. No two iterations share a prompt of one pass over them."""
    return table.take(order.slice((iteration - 1) * per_iteration, per_iteration)).combine_chunks()


INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]")


def question(prompt: Prompt) -> str:
    """A prompt in one form: without invisible characters, composed Unicode, one space for each run of white space.

    All turns of a conversation count, the system prompt too.
    """
    return " ".join(unicodedata.normalize("NFC", INVISIBLE.sub("", as_text(prompt))).split())


class HeldOut:
    """Finds the evaluation split of a prompt, also where its characters differ and the model is asked the same.

    `prompts` are the rows of the evaluation prompts; `asked` returns an id of the tokens of a prompt's first ask. The template
    and the tokenizer decide which differences vanish: spaces at the end, the Unicode form, upper case.
    """

    def __init__(self, prompts: Iterable[dict] = (), asked: Callable[[Prompt], str] = question):
        self.asked = asked
        self.split_of_text: dict[str, str] = {}
        self.split_of_ask: dict[str, str] = {}
        for row in prompts:
            self.split_of_text[question(row["prompt"])] = row["split"]
            self.split_of_ask[asked(row["prompt"])] = row["split"]

    def split(self, prompt: Prompt) -> str | None:
        """The evaluation split that a prompt belongs to; None if it belongs to none."""
        if not self.split_of_text:
            return None
        return self.split_of_text.get(question(prompt)) or self.split_of_ask.get(self.asked(prompt))


def drop_held_out(rows: list[dict], held_out: HeldOut) -> tuple[list[dict], list[dict]]:
    """Returns (training rows, rejected rows): a row is rejected if it is an evaluation prompt."""
    training_rows, rejected = [], []
    for row in rows:
        split = held_out.split(row["prompt"])
        if split is None:
            training_rows.append(row)
        else:
            rejected.append(reject(row, "prompts", f"is also a prompt of evaluation split {split!r}"))
    return training_rows, rejected


def drop_repeated(
    rows: list[dict], asked: Callable[[Prompt], str], line_of: dict[tuple[str, str | None], int]
) -> tuple[list[dict], list[dict]]:
    """Returns (rows, rejected rows): a row is rejected if an earlier one asks the model the same, with the same gold answer.

    `line_of` maps (id of the ask, gold answer) to the line of the first such row; this call adds the lines of `rows`.
    """
    first_rows, rejected = [], []
    for row in rows:
        first_line = line_of.setdefault((asked(row["prompt"]), row["answer"]), row["line"])
        if first_line == row["line"]:
            first_rows.append(row)
        else:
            rejected.append(reject(row, "prompts", f"asks the model the same as line {first_line}"))
    return first_rows, rejected


def with_token_counts(
    rows: list[dict], count: Callable[[Prompt], int], limit: int, *, field: str
) -> tuple[list[dict], list[dict]]:
    """Returns (rows with `num_tokens` of their first ask, rejected rows).

    `count` returns the tokens of a prompt's first ask. A prompt with more than `limit` tokens is rejected, never cut; `field`
    names the option behind the limit.
    """
    counted: list[dict] = []
    rejected: list[dict] = []
    for row in rows:
        num_tokens = count(row["prompt"])
        if num_tokens > limit:
            reason = f"prompt has {num_tokens} tokens, limit {limit} ({field})"
            rejected.append(reject(row, "prompts", reason, num_tokens=num_tokens, limit=limit))
        else:
            counted.append({**row, "num_tokens": num_tokens})
    return counted, rejected
