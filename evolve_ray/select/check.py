"""Checks what a selection returned for one prompt: each pair's keys, types, ids and texts, and that every draft is used once."""

import difflib
import math
import numbers
import re
from typing import Any

from evolve_ray.config.plugs import short
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.store import rows
from evolve_ray.store.turns import are_messages

KINDS: dict[str, tuple[type, ...]] = {"string": (str,), "bool": (bool,), "int64": (int,), "double": (float, int)}
NAMES = {"string": "a text", "bool": "true or false", "int64": "a whole number", "double": "a number"}
MAY_BE_NONE = ("chosen_score", "rejected_score")
SIDES = ("chosen", "rejected")
KEYS = (*rows.PAIR.names, *rows.TURN_DETAILS.names, "numbers")
TURN_KEYS = {field.name for field in rows.TURN}


def check_selected(name: str, prompt: dict, drafts: list[dict], selected: Any) -> set[str]:
    """The ids of the drafts that are in a pair.

    Raises UserError for a row that is not as `make_pair` and `reject_draft` make it, and IntegrityError if a draft is lost or
    counted twice.
    """
    place = f"selection.name: {name!r}, prompt {prompt['prompt_id']}"
    shape = isinstance(selected, tuple | list) and len(selected) == 2 and all(isinstance(part, list) for part in selected)
    if not shape:
        raise UserError(f"{place}: returned {short(repr(selected))}, but must return two lists: pairs, rejected drafts")
    pairs, unused = selected
    by_id = {draft["draft_id"]: draft for draft in drafts}
    for number, pair in enumerate(pairs, start=1):
        check_pair(f"{place}, pair {number}", prompt, by_id, pair)
    for number, row in enumerate(unused, start=1):
        fault = "" if isinstance(row, dict) and {"id", "stage", "reason"} <= row.keys() else "has no id, stage and reason"
        if fault or row["id"] not in by_id:
            fault = fault or f"has id {row['id']!r}, which is no draft of the prompt"
            raise UserError(f"{place}, rejected row {number}: {fault}; make it with evolve_ray.select.pairs.reject_draft")
    used = set().union(*map(used_drafts, pairs))
    rejected = [row["id"] for row in unused]
    if len(used) + len(rejected) != len(drafts) or used | set(rejected) != by_id.keys():
        raise IntegrityError(
            f"selection {name}: prompt {prompt['prompt_id']} has {len(drafts)} drafts, but {len(used)} are in pairs and "
            f"{len(rejected)} rejected; a selection must use or reject every draft once"
        )
    return used


def check_pair(place: str, prompt: dict, drafts: dict[str, dict], pair: Any) -> None:
    """Raises UserError for a missing or unknown key, a wrong type, or a text that is not the draft's."""
    end = "make it with evolve_ray.select.pairs.make_pair"
    if not isinstance(pair, dict):
        raise UserError(f"{place}: is of type {type(pair).__name__}, but must be a dict; {end}")
    for field in rows.PAIR:
        if field.name not in pair:
            raise UserError(f"{place}: has no {field.name!r}; {end}")
        value, kind = pair[field.name], str(field.type)
        # The prompt, which may be a conversation, is compared with the prompt's row below.
        none = field.name == "prompt" or (value is None and field.name in MAY_BE_NONE)
        if not none and (not isinstance(value, KINDS[kind]) or (kind != "bool" and isinstance(value, bool))):
            raise UserError(f"{place}: {field.name} is {short(repr(value))}, but must be {NAMES[kind]}; {end}")
    for key in pair:
        if key not in KEYS:
            nearest = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = (
                f"did you mean {nearest[0]!r}?" if nearest else "numbers for the loss belong into make_pair(..., numbers={...})"
            )
            raise UserError(f"{place}: has an unknown key {key!r}; {hint}")
    for number_name, value in pair.get("numbers", {}).items():
        fine = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        if not fine or not re.fullmatch(r"[A-Za-z_]\w*", str(number_name)):
            raise UserError(
                f"{place}: numbers.{number_name} is {short(repr(value))}, but must be a finite number with a plain name"
            )
    for key in ("prompt_id", "prompt"):
        if pair[key] != prompt[key]:
            raise UserError(f"{place}: {key} is {short(repr(pair[key]))}, but must be the prompt's; {end}")
    for side in SIDES:
        draft = drafts.get(pair[f"{side}_id"])
        if draft is None:
            raise UserError(f"{place}: {side}_id is {pair[f'{side}_id']!r}, which is no draft of the prompt; {end}")
        if draft["text"] != pair[side]:
            raise UserError(f"{place}: {side} is not the text of draft {draft['draft_id']}; {end}")
        if draft.get("kind", "answer") != (pair.get("kind") or "answer"):
            raise UserError(
                f"{place}: {side}_id is of kind {draft['kind']!r}, but the row of {pair.get('kind') or 'answer'!r}; make it with "
                "evolve_ray.select.pairs.make_turn"
            )
    check_turns(place, drafts, pair)


def check_turns(place: str, drafts: dict[str, dict], pair: dict) -> None:
    """Raises UserError for a context that is not messages, and for further turns that are not as `make_turn` makes them."""
    end = "make it with evolve_ray.select.pairs.make_turn"
    if pair.get("context") is not None and not are_messages(pair["context"]):
        raise UserError(f"{place}: context is {short(repr(pair['context']))}, but must be messages with role and content; {end}")
    if not isinstance(pair.get("kind", ""), str):
        raise UserError(f"{place}: kind is {short(repr(pair['kind']))}, but must be a text; {end}")
    turns = pair.get("turns") or []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and turn.keys() == TURN_KEYS for turn in turns):
        raise UserError(f"{place}: turns is {short(repr(turns))}, but must be a list of turns; {end}")
    names = [turn["name"] for turn in turns]
    for turn in turns:
        name, draft = turn["name"], drafts.get(turn["draft_id"])
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name)) or "_after_" in name or name in SIDES or names.count(name) > 1:
            raise UserError(
                f"{place}: has a turn with the name {name!r}, but needs a plain one of its own, without `_after_` and not "
                f"{' or '.join(SIDES)}"
            )
        happened = turn["draft_id"] is not None or turn["text"] != ""
        if happened and (draft is None or draft["text"] != turn["text"] or not are_messages(turn["context"])):
            raise UserError(f"{place}: turn {name!r} is not the draft {turn['draft_id']!r} after its messages; {end}")


def used_drafts(pair: dict) -> set[str]:
    """The ids of the drafts in a row: its two sides and its further turns."""
    return {pair[f"{side}_id"] for side in SIDES} | {turn["draft_id"] for turn in pair.get("turns") or ()} - {None}
