"""Reads preference triples (prompt, chosen, rejected) as training pairs."""

import collections
from collections.abc import Callable

from evolve_ray.data.prompts import HeldOut
from evolve_ray.data.read import faults_error, read_records
from evolve_ray.data.shapes import Shape, counted, read_triple
from evolve_ray.errors import UserError
from evolve_ray.store.rows import content_id, reject
from evolve_ray.store.turns import Prompt


def read_triples(
    path: str, *, prompt_column: str, chosen_column: str, rejected_column: str, source_split: str = "train", limit: int = 0,
    held_out: HeldOut | None = None, system: str = "", same: Callable[[str, str], bool] | None = None,
    prompt_fault: Callable[[Prompt], str] | None = None, shape: Shape | None = None,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Returns (pair rows in the order of the file, rejected rows). Both answers of a triple count as complete.

    Rejects duplicates, triples beyond `limit` pairs (0: no limit), triples on evaluation prompts, which `held_out` finds, and
    triples whose answers are the `same`. A prompt without a system prompt gets `system`; `prompt_fault` returns what is wrong
    with a prompt, "" if nothing is; `shape` counts what the prompts are.
    Raises UserError with all faults of the file.
    """
    held_out, shape = held_out or HeldOut(), shape or Shape()
    faults: list[str] = []
    pairs: dict[str, dict] = {}
    rejected_rows: list[dict] = []
    for line, record in read_records(path, source_split, faults):
        where = f"{path}:{line}"
        triple = read_triple(record, prompt_column, chosen_column, rejected_column, where, faults, shape)
        if triple is None:
            continue
        prompt, chosen, rejected = counted(triple[0], system, shape), *triple[1:]
        if prompt_fault and (fault := prompt_fault(prompt)):
            faults.append(f"{where}: {fault}")
            continue
        pair_id = content_id("pair", prompt, chosen, rejected)
        if split := held_out.split(prompt):
            row = {"id": pair_id, "file": path, "line": line}
            rejected_rows.append(reject(row, "pairs", f"is on a prompt of evaluation split {split!r}"))
        elif pair_id in pairs:
            rejected_rows.append(reject({"id": pair_id, "file": path, "line": line}, "pairs", "duplicate"))
        elif same and same(chosen, rejected):
            reason = "chosen and rejected are the same tokens, so a preference objective learns nothing from them"
            rejected_rows.append(reject({"id": pair_id, "file": path, "line": line}, "pairs", reason))
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
            rejected_rows.append(reject({"id": pair_id, "file": path, "line": line}, "pairs", f"beyond the limit of {limit}"))
    if faults:
        raise faults_error(path, faults)
    if not pairs and rejected_rows:
        reasons = collections.Counter(row["reason"] for row in rejected_rows).most_common(3)
        shown = "; ".join(f"{reason} ({count})" for reason, count in reasons)
        raise UserError(f"{path}: none of {len(rejected_rows)} preference triples can be used: {shown}; use others")
    if not pairs:
        raise UserError(f"{path}: contains no preference triples; use a file with at least one row")
    return list(pairs.values()), rejected_rows
