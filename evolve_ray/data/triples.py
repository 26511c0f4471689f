"""Reads preference triples (prompt, chosen, rejected) as training pairs."""

from collections.abc import Callable

from evolve_ray.data.prompts import HeldOut
from evolve_ray.data.read import faults_error, read_records, text_of
from evolve_ray.errors import UserError
from evolve_ray.store.rows import content_id, reject


def read_triples(
    path: str, *, prompt_column: str, chosen_column: str, rejected_column: str, source_split: str = "train", limit: int = 0,
    held_out: HeldOut | None = None, same_tokens: Callable[[dict, dict], bool] | None = None,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Returns (pair rows in the order of the file, rejected rows). Both answers of a triple count as complete.

    Rejects duplicates, triples beyond `limit` pairs (0: no limit), and triples on evaluation prompts, which `held_out` finds.
    With `same_tokens`, which preference objectives need, it rejects triples whose two answers are the same tokens. Raises
    UserError with all faults of the file.
    """
    held_out = held_out or HeldOut()
    faults: list[str] = []
    pairs: dict[str, dict] = {}
    rejected_rows: list[dict] = []
    for line, record in read_records(path, source_split, faults):
        where = f"{path}:{line}"
        prompt = text_of(record, prompt_column, where, faults)
        chosen = text_of(record, chosen_column, where, faults)
        rejected = text_of(record, rejected_column, where, faults)
        if prompt is None or chosen is None or rejected is None:
            continue
        pair_id = content_id("pair", prompt, chosen, rejected)
        if split := held_out.split(prompt):
            row = {"id": pair_id, "file": path, "line": line}
            rejected_rows.append(reject(row, "pairs", f"is on a prompt of evaluation split {split!r}"))
        elif pair_id in pairs:
            rejected_rows.append(reject({"id": pair_id, "file": path, "line": line}, "pairs", "duplicate"))
        elif same_tokens and same_tokens(answer(chosen), answer(rejected)):
            rejected_rows.append(
                reject({"id": pair_id, "file": path, "line": line}, "pairs", "its two answers are the same tokens")
            )
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
        raise UserError(
            f"{path}: none of {len(rejected_rows)} preference triples can be used ({rejected_rows[0]['reason']}); use others"
        )
    if not pairs:
        raise UserError(f"{path}: contains no preference triples; use a file with at least one row")
    return list(pairs.values()), rejected_rows


def answer(text: str) -> dict:
    return {"text": text, "finished": True}
