"""What the models of an evaluation answered, round by round: the form that outside benchmarks ask for."""

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


@dataclass(frozen=True)
class Answers:
    """One model's answers of one round, `{prompt: draft}` in the order of the prompts."""

    model: str
    round: int
    name: str  # of model and round, such as tiny@3-y2; safe as a file name
    drafts: dict[str, dict]
    identity: str  # of the committed drafts
    committed: float  # when, in seconds since 1970


def read_evaluation(folder: Path, split: str | None) -> tuple[list[Answers], str]:
    """The answers of every model and round of an output folder of jobs/evaluate.py, and the file that their prompts came from.

    Only prompts count of which a model has all rounds, so that its rounds speak of the same prompts.
    """
    try:
        found = json.loads((folder / "evaluation.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: has no evaluation.json; give the output folder of a finished jobs/evaluate.py") from None
    except ValueError:
        raise IntegrityError(f"{folder}/evaluation.json: is damaged; submit the evaluation again to write it") from None
    splits = found["config"]["evaluation"]["splits"]
    if split is None and len(splits) > 1:
        raise UserError(f"--split: is missing, and the evaluation has {len(splits)}: {', '.join(splits)}; name one")
    split = split or next(iter(splits))
    if split not in splits:
        raise UserError(f"--split {split}: is unknown; the evaluation has {', '.join(splits)}")
    asked = read_committed(folder / "prompts").path("prompts.parquet")
    prompts = {row["prompt_id"]: row["prompt"] for row in read_table(asked) if row["split"] == split}
    models = [Named(model["name"], model["given"], Path(model["path"]), model["model"]) for model in found["models"]]
    taken = collections.Counter(file_name(model.name) for model in models)
    answers = []
    for model in models:
        name = file_name(model.name) if taken[file_name(model.name)] == 1 else model.slug
        answers += model_answers(folder / "models" / model.slug / "chain" / "generations", model.name, name, prompts)
    return answers, splits[split]


def model_answers(folder: Path, model: str, name: str, prompts: dict[str, str]) -> list[Answers]:
    """A model's whole chains, one Answers a round."""
    manifest = read_committed(folder)
    chains: dict[str, dict[int, dict]] = {prompt_id: {} for prompt_id in prompts}
    for draft in read_rows(manifest):
        if draft["prompt_id"] in chains and draft["kind"] == "answer":
            chains[draft["prompt_id"]][draft["round"]] = draft
    rounds = max((max(chain, default=0) for chain in chains.values()), default=0)
    whole = {prompt_id: chain for prompt_id, chain in chains.items() if len(chain) == rounds > 0}
    if not whole:
        raise UserError(f"{folder}: has no prompt with an answer in every round; look into its rejected.jsonl")
    committed = (folder / "MANIFEST.json").stat().st_mtime
    return [
        Answers(model, number, f"{name}-y{number}",
                {prompts[prompt_id]: chain[number] for prompt_id, chain in whole.items()}, manifest.identity, committed)
        for number in range(1, rounds + 1)
    ]  # fmt: skip


def read_committed(folder: Path) -> Manifest:
    manifest = read_manifest(folder, verify=True)
    if manifest is None:
        raise UserError(f"{folder}: is not committed; submit the evaluation again and let it end")
    return manifest


def file_name(text: str) -> str:
    """`text` as one part of a path."""
    return re.sub(r"[^A-Za-z0-9@._+-]+", "-", text).strip("-.")[-100:]
