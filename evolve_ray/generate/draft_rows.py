"""Between rows and what a strategy sees: the prompt's row, and a draft."""

import json
from typing import Any

from evolve_ray.refine.asks import Draft


def row_of_prompt(prompt: dict) -> dict:
    """The prompt's row as a strategy sees it: `prompt_id`, `prompt`, `answer`, `draft` and `columns`; None where nothing is."""
    columns = json.loads(prompt["columns"]) if prompt.get("columns") else {}
    return {name: prompt.get(name) for name in ("prompt_id", "prompt", "answer", "draft")} | {"columns": columns}


def draft_of(row: dict, stopped_at: str = "") -> Draft:
    """The draft of a row, as a strategy receives it."""
    names = ("draft_id", "text", "sample", "round", "parent_id", "finish_reason")
    return Draft(**{name: row[name] for name in names}, stopped_at=stopped_at)


def mark_returned(rows: list[dict], returned: Any) -> None:
    """Marks the last answer among the drafts that a strategy returned: its final answer."""
    drafts = returned if isinstance(returned, list | tuple) else [returned]
    answers = {row["draft_id"]: row for row in rows if row["kind"] == "answer"}
    for draft in reversed(drafts):
        if isinstance(draft, Draft) and draft.draft_id in answers:
            answers[draft.draft_id]["returned_last"] = True
            return
