"""The rows that stages exchange: schemas, content ids, seeds, and typed Parquet.

Ids are content hashes, and seeds derive from (run seed, iteration, row id). Neither depends on order, process or `hash()`.
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
        ("prompt", pa.string()),  # null for a conversation, see MESSAGES
        ("answer", pa.string()),  # the gold answer; null if no answer can be checked
        ("split", pa.string()),  # "train" or the name of an evaluation split
        ("file", pa.string()),
        ("line", pa.int64()),  # 1-based line (JSONL) or row (other formats)
        ("num_tokens", pa.int64()),  # tokens of the first ask, including the template's
    ]
)
# A table of prompts or pairs has this column too if some of its prompts are conversations; it is null for the others.
MESSAGES = pa.field("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
PROMPT_WITH_DRAFT = PROMPT.append(pa.field("draft", pa.string()))  # a first draft that the model did not write itself
COLUMNS = pa.field("columns", pa.string())  # JSON of the further columns that the recipe names, for a strategy


def prompt_schema(*, draft: bool = False, columns: bool = False) -> pa.Schema:
    """The columns of prompts, with those that a recipe asks for."""
    schema = PROMPT_WITH_DRAFT if draft else PROMPT
    return schema.append(COLUMNS) if columns else schema


GENERATION = pa.schema(
    [
        ("draft_id", pa.string()),
        ("prompt_id", pa.string()),
        ("split", pa.string()),
        ("sample", pa.int64()),  # number of the independent sample or chain, from 0
        ("round", pa.int64()),  # the first draft, y1, is round 1
        ("kind", pa.string()),  # "answer"; "critique" for a text that helps to write one; "skipped" for a round that was left out
        ("parent_id", pa.string()),  # the draft that this one refines, or after which the chain ended; null in round 1
        ("text", pa.string()),  # empty if the round was left out
        ("finish_reason", pa.string()),  # "stop"; "length" if it was cut; "unchanged" or "right" if the round was left out
        ("num_prompt_tokens", pa.int64()),
        ("num_tokens", pa.int64()),
        ("seed", pa.int64()),  # null if the draft came with its prompt, and if the round was left out
        ("model", pa.string()),  # content hash of the model that wrote it; null in the same cases
    ]
)
# Further columns of drafts, each there only in a table in which a row has a value. They say what the text alone does not.
DRAFT_DETAILS = pa.schema(
    [
        ("token_ids", pa.list_(pa.int32())),  # what the engine wrote, its end token too; null if these are the tokens of `text`
        ("logps", pa.list_(pa.float32())),  # the engine's log-probabilities of all its tokens, in nats, with `sampling.logps`
        ("thinking", pa.string()),  # what the model thought before the answer; `text` is the answer alone
        ("num_thinking_tokens", pa.int64()),
        ("fault", pa.string()),  # why the draft must not be learned: no answer, or a token without a text
        ("num_prefix_tokens", pa.int64()),  # the first of `token_ids`, which the ask gave and the model continued
        ("parts", pa.list_(pa.string())),  # of a draft that the strategy composed: the ids of the drafts that it used
        ("strategy_score", pa.float64()),  # the score that the strategy gave it
        ("returned_last", pa.bool_()),  # of a strategy of the user's own: it is the last answer that the strategy returned
        # What the ask showed the model, of a strategy whose asks template and drafts cannot tell, as of the user's own.
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)
SCORE = pa.schema(
    [
        ("draft_id", pa.string()),
        ("prompt_id", pa.string()),
        ("score", pa.float64()),
        ("correct", pa.float64()),  # value of the verifier, 1.0 = exactly right; null without a verifier
    ]
)
PAIR = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_finished", pa.bool_()),  # false: it was cut at the token limit, so no end token is trained
        ("rejected_finished", pa.bool_()),
        ("chosen_id", pa.string()),  # draft ids; null for pairs that the user gave
        ("rejected_id", pa.string()),
        ("chosen_round", pa.int64()),
        ("rejected_round", pa.int64()),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
    ]
)
PAIR_DETAILS = pa.schema(  # in the same way; what they say of a draft of the pair
    [
        ("chosen_token_ids", pa.list_(pa.int32())),
        ("chosen_logps", pa.list_(pa.float32())),
        ("rejected_token_ids", pa.list_(pa.int32())),
        ("chosen_num_thinking_tokens", pa.int64()),
        ("rejected_num_thinking_tokens", pa.int64()),
    ]
)

# A further turn of a row, which its objective names. Without a `context` and with an empty text: the turn did not happen.
TURN = pa.struct(
    [
        ("name", pa.string()),
        ("context", MESSAGES.type),
        ("text", pa.string()),
        ("finished", pa.bool_()),
        ("draft_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("num_thinking_tokens", pa.int64()),
    ]
)
TURN_DETAILS = pa.schema(  # in the same way; what a row of turns says beside two responses to the prompt
    [
        ("context", MESSAGES.type),  # the messages before both responses, in place of those that ask for the first draft
        ("kind", pa.string()),  # of the responses, where it is not "answer"
        ("turns", pa.list_(TURN)),
    ]
)

ORIGIN = pa.schema(  # of the rows of a training into which others are mixed, in their order
    [
        ("pair_id", pa.string()),
        ("origin", pa.string()),  # "own", "replayed" from an earlier iteration, or "given"
        ("iteration", pa.int64()),
        ("table", pa.string()),  # the folder in that iteration from which the row comes
    ]
)


def mixture_text(stats: dict[str, Any]) -> str:
    """What a training with mixed rows is made of, by its manifest's counts: "5 own rows, 3 replayed from iterations 1-2"."""
    parts = [f"{stats['num_own']:,} own rows"]
    for name, wanted in (("replayed", stats["wanted_replayed"]), ("given", stats["wanted_given"])):
        number = stats[f"num_{name}"]
        if not (number or wanted):
            continue
        sources = [int(iteration) for iteration, count in stats["replayed"].items() if count] if name == "replayed" else []
        span = f"{min(sources)}-{max(sources)}" if len(sources) > 1 else "".join(map(str, sources))
        source = f" from iteration{'s' * (len(sources) > 1)} {span}" if sources else ""
        parts.append(f"{number:,} {name}{source}" + (f" (there are no more; the share is {wanted:,})" if number < wanted else ""))
    return ", ".join(parts)


def numbered(schema: pa.Schema, numbers: list[str]) -> pa.Schema:
    """The schema of pairs, with a struct column `numbers` if they have named numbers for the loss."""
    return schema.append(pa.field("numbers", pa.struct([(name, pa.float64()) for name in numbers]))) if numbers else schema


# Sums of the log-probabilities of response tokens under the reference policy; null if the objective does not need them.
# A table whose objective needs further turns has a column for each of them too.
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


def token_column(name: str) -> str:
    """The column of the reference that holds the log-probability of each response token of the sequence `name`."""
    return f"{name}_tokens"


def initial_column(name: str) -> str:
    """The column of the reference that holds what the column `name` holds, under the initial policy."""
    return f"initial_{name}"


def reference_schema(names: tuple[str, ...], *, tokens: bool, initial: bool) -> pa.Schema:
    """The schema of the reference for an objective that reads the sequences `names`, with tokens or initial policy if it asks.

    A further turn among `names` has a column too.
    """
    further = [(name, pa.float64()) for name in names if name not in REFERENCE.names]
    more = [(initial_column(name), pa.float64()) for name in names if initial]
    columns = [*names, *(name for name, _ in more)]
    return pa.schema([*REFERENCE, *further, *more, *((token_column(name), pa.list_(pa.float32())) for name in columns if tokens)])


def canonical(value: Any) -> bytes:
    """Returns the canonical JSON of `value`: sorted keys, no spaces, UTF-8; ValueError for a number that is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(
        "utf-8", "surrogatepass"
    )


def from_canonical(data: bytes) -> Any:
    """Returns the value of a canonical JSON; tuples come back as lists."""
    return json.loads(data.decode("utf-8", "surrogatepass"))


def digest(value: Any) -> str:
    """Returns the sha256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def content_id(*parts: Any) -> str:
    """Returns a 16-digit hex id that depends only on `parts`."""
    return digest(list(parts))[:16]


def derive_seed(*parts: Any) -> int:
    """Returns a seed in [0, 2**31) that depends only on `parts`; vLLM and NumPy accept that range."""
    return int(digest(list(parts))[:12], 16) % 2**31


def write_table(
    path: Path, rows: list[dict] | pa.Table, schema: pa.Schema, details: pa.Schema | None = None, *, group_rows: int | None = None
) -> None:  # fmt: skip
    """Writes `rows` to one Parquet file, in row groups of `group_rows`; the same rows give the same bytes.

    Of `details`, which a row may leave out, those columns are written in which a row has a value.
    """
    if not isinstance(rows, pa.Table):
        names, known = set(schema.names), set(details.names if details else ())
        for row in rows[:1]:
            assert set(row) - known == names, f"row has {sorted(set(row) ^ names)} too many or too few for the schema"
        rows = to_table(rows, with_details(schema, details, rows) if details else schema)
    pq.write_table(rows, path, compression="zstd", row_group_size=group_rows)


def with_details(schema: pa.Schema, details: pa.Schema, rows: list[dict]) -> pa.Schema:
    """The schema with those of the further columns in which a row has a value."""
    used = [field for field in details if any(row.get(field.name) is not None for row in rows)]
    return pa.schema([*schema, *used])


def read_table(path: Path) -> list[dict]:
    """Returns all rows of one Parquet file, in the order of the file."""
    return from_table(pq.read_table(path))


def to_table(rows: list[dict], schema: pa.Schema) -> pa.Table:
    """`rows` as a table; it has the column MESSAGES if the schema has it, or if a prompt is a conversation."""
    if "prompt" in schema.names:
        if any(not isinstance(row["prompt"], str) for row in rows) and MESSAGES.name not in schema.names:
            schema = schema.append(MESSAGES)
        if MESSAGES.name in schema.names:
            rows = [row if isinstance(row["prompt"], str) else {**row, "prompt": None, "messages": row["prompt"]} for row in rows]
    return pa.Table.from_pylist(rows, schema=schema)


def from_table(table: pa.Table) -> list[dict]:
    """The rows of a table; the prompt of a row is a text, or a tuple of messages."""
    rows = table.to_pylist()
    if {"prompt", MESSAGES.name} <= set(table.column_names):
        for row in rows:
            messages = row.pop(MESSAGES.name)
            row["prompt"] = row["prompt"] if messages is None else tuple(messages)
    return rows


def with_messages(schema: pa.Schema, path: Path) -> pa.Schema:
    """The schema of a table whose prompts come from the table at `path`."""
    return schema.append(MESSAGES) if MESSAGES.name in pq.read_schema(path).names else schema


def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    """Writes one line per row, while the rows are produced; returns the number of rows."""
    number = 0
    with open(path, "wb") as file:
        for number, row in enumerate(rows, start=1):  # noqa: B007 (the last number is returned)
            file.write(canonical(row) + b"\n")
    return number


def read_jsonl(path: Path) -> list[dict]:
    """Returns all rows of one JSONL file, in the order of the file."""
    with open(path, "rb") as file:
        return [json.loads(line) for line in file]


def reject(row: dict, stage: str, reason: str, **more: Any) -> dict:
    """Returns the rejected row of an input row that is not used, as `rejected.jsonl` holds it."""
    return {
        "id": row.get("prompt_id") or row.get("id"),
        "file": row.get("file"),
        "line": row.get("line"),
        "stage": stage,
        "reason": reason,
        **more,
    }
