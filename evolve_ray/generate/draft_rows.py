"""Between rows and what a strategy sees: the prompt's row, and a draft."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from evolve_ray.errors import UserError
from evolve_ray.generate.spec import Completion
from evolve_ray.refine.asks import Ask, Draft
from evolve_ray.store import rows


def row_of_prompt(prompt: dict) -> dict:
    """The prompt's row as a strategy sees it: `prompt_id`, `prompt`, `answer`, `draft` and `columns`; None where nothing is."""
    columns = json.loads(prompt["columns"]) if prompt.get("columns") else {}
    return {name: prompt.get(name) for name in ("prompt_id", "prompt", "answer", "draft")} | {"columns": columns}


def draft_of(row: dict, stopped_at: str = "") -> Draft:
    """The draft of a row, as a strategy receives it."""
    names = ("draft_id", "text", "sample", "round", "parent_id", "finish_reason")
    return Draft(**{name: row[name] for name in names}, stopped_at=stopped_at)


def mark_returned(chain_rows: list[dict], returned: Any) -> None:
    """Marks the last answer among the drafts that a strategy returned: its final answer."""
    drafts = returned if isinstance(returned, list | tuple) else [returned]
    answers = {row["draft_id"]: row for row in chain_rows if row["kind"] == "answer"}
    for draft in reversed(drafts):
        if isinstance(draft, Draft) and draft.draft_id in answers:
            answers[draft.draft_id]["returned_last"] = True
            return


def draft_row(
    completion: Completion, prompt: dict, ask: Ask, seed: int | None, model_hash: str | None, again: tuple[int, ...] = ()
) -> dict:  # fmt: skip
    """The generation row of a response; without a seed and a model hash for a draft that no model wrote.

    `again` numbers the asks of one sample, round and kind from the second one on.
    """
    position = (prompt["prompt_id"], ask.sample, ask.round, ask.kind, *again)
    return {
        "draft_id": rows.content_id("draft", model_hash, *position, completion.text),
        "prompt_id": prompt["prompt_id"],
        "split": prompt["split"],
        "sample": ask.sample,
        "round": ask.round,
        "kind": ask.kind,
        "parent_id": ask.parent_id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_tokens": completion.num_tokens,
        "seed": seed,
        "model": model_hash,
    }


def skipped_row(last_row: dict, number: int, reason: str) -> dict:
    """The row of round `number`, which a chain skipped after the draft of `last_row`: no text, no model, no tokens."""
    return {name: value for name, value in last_row.items() if name not in rows.DRAFT_DETAILS.names} | {
        "draft_id": rows.content_id("skipped", last_row["draft_id"], number),
        "round": number,
        "kind": "skipped",
        "parent_id": last_row["draft_id"],
        "text": "",
        "finish_reason": reason,
        "num_prompt_tokens": 0,
        "num_tokens": 0,
        "seed": None,
        "model": None,
    }


def given_row(prompt: dict, spec: Any) -> dict:
    """The row of a draft that comes with its prompt: it has no model, no seed and no tokens."""
    if prompt.get("draft") is None:
        raise UserError(
            f"strategy.name: {spec.strategy.name!r} refines the drafts of its prompts, but {spec.prompts} has no column 'draft'; "
            "add the column or use another strategy"
        )
    completion = Completion("", prompt["draft"], 0, 0, 0, "stop")
    return draft_row(completion, prompt, Ask((), 0, 1), None, None)


def in_order(chain_rows: list[dict], order: dict[str, int]) -> list[dict]:
    """A prompt's rows by sample, then round; a critique stands before the answer of its round, an earlier ask before a later."""
    return sorted(
        chain_rows,
        key=lambda row: (row["sample"], row["round"], row["kind"] == "answer", order.get(row["draft_id"], 0)),
    )


def as_read(
    completion: Completion, ask: Ask, prefix_ids: list[int], read: Callable[[Completion], dict]
) -> tuple[Completion, dict[str, Any]]:  # fmt: skip
    """The completion with its prefix and with the answer alone as its text, and what its row says beside that."""
    details: dict[str, Any] = {}
    if ask.prefix:
        ids = (*prefix_ids, *completion.token_ids) if completion.token_ids else ()
        completion = dataclasses.replace(completion, text=ask.prefix + completion.text, token_ids=ids)
        details = {"num_prefix_tokens": len(prefix_ids)} | ({"token_ids": list(ids)} if ids else {})
    details |= read(completion)
    return dataclasses.replace(completion, text=details.pop("text", completion.text)), details
