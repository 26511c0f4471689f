"""Reads the committed answers of an evaluation, for each model and round, in the form that the benchmarks need."""

import collections
import json
import re
from dataclasses import dataclass
from pathlib import Path

from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.models.checkpoints import Named
from evolve_ray.store.manifest import Manifest, read_manifest
from evolve_ray.store.rows import read_table
from evolve_ray.store.shards import read_rows
from evolve_ray.store.turns import earlier_turns, last_turn


@dataclass(frozen=True)
class Answers:
    """The answers of one model in one round, `{prompt: draft}` in the order of the prompts; `asked` are all prompts."""

    model: str
    round: int
    name: str  # model and round, for example tiny@3-y2; safe as a file name
    drafts: dict[str, dict]
    identity: str  # the manifest identity of the drafts
    committed: float  # time of the commit, seconds since 1970
    asked: list[str]


def read_evaluation(folder: Path, split: str | None) -> tuple[list[Answers], str]:
    """Returns the answers of every model and round in an output folder of jobs/evaluate.py, and the file of their prompts.

    Prompts without an answer in every round are left out, so that all rounds of a model have the same prompts.
    """
    try:
        evaluation = json.loads((folder / "evaluation.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: has no evaluation.json; give the output folder of a finished jobs/evaluate.py") from None
    except ValueError:
        raise IntegrityError(f"{folder}/evaluation.json: is damaged; submit the evaluation again to rewrite it") from None
    splits = evaluation["config"]["evaluation"]["splits"]
    if split is None and len(splits) > 1:
        raise UserError(f"--split: is missing, and the evaluation has {len(splits)} splits: {', '.join(splits)}; choose one")
    split = split or next(iter(splits))
    if split not in splits:
        raise UserError(f"--split {split}: unknown split; the evaluation has {', '.join(splits)}")
    prompts_file = read_committed(folder / "prompts").path("prompts.parquet")
    prompts = {row["prompt_id"]: one_turn(row) for row in read_table(prompts_file) if row["split"] == split}
    models = [Named(model["name"], model["given"], Path(model["path"]), model["model"]) for model in evaluation["models"]]
    name_counts = collections.Counter(file_name(model.name) for model in models)
    answers = []
    for model in models:
        name = file_name(model.name) if name_counts[file_name(model.name)] == 1 else model.slug
        answers += model_answers(folder / "models" / model.slug / "chain" / "generations", model.name, name, prompts)
    return answers, splits[split]


def one_turn(row: dict) -> str:
    """The user turn of a prompt; a system prompt before it is not shown to a judge."""
    if any(message["role"] != "system" for message in earlier_turns(row["prompt"])):
        raise UserError(
            f"{row['file']}:{row['line']}: is a conversation of several turns, but a benchmark judges answers to single prompts; "
            "use the benchmark's own prompts, or choose another --split"
        )
    return last_turn(row["prompt"])


def model_answers(folder: Path, model: str, name: str, prompts: dict[str, str]) -> list[Answers]:
    """Returns one `Answers` per round from the complete chains of a model."""
    manifest = read_committed(folder)
    chains: dict[str, dict[int, dict]] = {prompt_id: {} for prompt_id in prompts}
    for draft in read_rows(manifest):
        if draft["prompt_id"] in chains and draft["kind"] == "answer":
            chains[draft["prompt_id"]][draft["round"]] = draft
    rounds = max((max(chain, default=0) for chain in chains.values()), default=0)
    complete = {prompt_id: chain for prompt_id, chain in chains.items() if len(chain) == rounds > 0}
    if not complete:
        raise UserError(f"{folder}: no prompt has an answer in every round; see its rejected.jsonl for the reasons")
    committed = (folder / "MANIFEST.json").stat().st_mtime
    return [
        Answers(model, round_number, f"{name}-y{round_number}",
                {prompts[prompt_id]: chain[round_number] for prompt_id, chain in complete.items()}, manifest.identity, committed,
                list(prompts.values()))
        for round_number in range(1, rounds + 1)
    ]  # fmt: skip


def read_committed(folder: Path) -> Manifest:
    manifest = read_manifest(folder, verify=True)
    if manifest is None:
        raise UserError(f"{folder}: is not committed; submit the evaluation again to finish it")
    return manifest


def file_name(text: str) -> str:
    """Returns `text` as a safe file name."""
    return re.sub(r"[^A-Za-z0-9@._+-]+", "-", text).strip("-.")[-100:]
