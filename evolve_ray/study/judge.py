"""Scores the held-out drafts of a study with the trained reward model of the tiny world, which does not know the answers.

The verifier always picks the best of several answers. A user has no such verifier, only a reward model.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from evolve_ray.config import options
from evolve_ray.config.options import Config
from evolve_ray.models.folders import content_hash
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import Manifest, read_manifest
from evolve_ray.store.run import Run, Stage
from evolve_ray.toy.parts import toy_parts

NAME = "toy:reward_model"
SCHEMA = pa.schema([("draft_id", pa.string()), ("score", pa.float64())])


def judge(root: Path, config: Config, models: list[dict], say: Callable[[str], None]) -> dict[str, float]:
    """Scores by draft id of all held-out chains and parallel samples of a finished run; computed once and kept beside the run.

    `config` has the reward model as its scorer; `models` are those of report.json.
    """
    folder = Path(toy_parts(config, Run(root), say)[NAME])
    tables = list(evaluations(root, models))
    key = rows.digest([content_hash(folder), [table.identity for pair in tables for table in pair]])
    stage = Stage(root.parent / f"judged-{root.name}", "judged", key)
    if stage.superseded():
        stage.put_aside()
    manifest = stage.committed()
    if manifest is None:
        from evolve_ray.score.reward_model import RewardModel

        say(f"   {root.name}: the reward model scores its held-out drafts")
        score = RewardModel(options.Scorer(batch_size=256, max_tokens=config.scorer.max_tokens), str(folder))
        scores: dict[str, float] = {}
        for drafts, prompts in tables:
            text_of = {row["prompt_id"]: row["prompt"] for row in rows.read_table(prompts.path("prompts.parquet"))}
            table = [row for row in shards.read_rows(drafts) if row["split"] == "heldout" and row["draft_id"] not in scores]
            values = score([text_of[row["prompt_id"]] for row in table], [None] * len(table), [row["text"] for row in table])
            scores |= {row["draft_id"]: value for row, value in zip(table, values, strict=True)}
        rows.write_table(stage.start() / "scores.parquet", [{"draft_id": k, "score": v} for k, v in scores.items()], SCHEMA)
        manifest = stage.commit(num_rows=len(scores))
    return {row["draft_id"]: row["score"] for row in rows.read_table(manifest.path("scores.parquet"))}


def evaluations(root: Path, models: list[dict]) -> Iterator[tuple[Manifest, Manifest]]:
    """(drafts, prompts) of the chains of each model, and of its parallel samples."""
    prompts = read_manifest(Run(root).iteration(0) / "held_out")
    for model in models:
        folder = Run(root).iteration(model["iteration"]) / ("base_evaluation" if model["name"] == "base" else "evaluation")
        for part in (folder, folder / "parallel"):
            drafts = read_manifest(part / "generations")
            if drafts and prompts:
                yield drafts, prompts
