"""Scoring: actors that host the recipe's scorer and verifier and put a number on every draft."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from evolve_ray.config import options
from evolve_ray.errors import IntegrityError
from evolve_ray.pools.actors import PoolOptions
from evolve_ray.pools.worker import ShardWorker
from evolve_ray.score.combined import build_scorer
from evolve_ray.score.protocol import checked, is_finite
from evolve_ray.score.verifiers import build_verifier
from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.shards import shard_name

VERSION = 3


@dataclass(frozen=True)
class ScoreSpec:
    """Everything a scoring actor needs, picklable. `drafts` is where the generation stage keeps its shards."""

    prompts: str
    drafts: str
    work: str
    key: str
    shard_prompts: int
    scorer: options.Scorer
    reward_models: dict[str, str]  # the names in the recipe -> local folders
    verifier: options.Verifier | None


class ScoreWorker(ShardWorker):
    """Scores one shard of drafts per call; only answers are scored, not the critiques on the way to them."""

    schema = rows.SCORE
    stage = "scores"

    def __init__(self, spec: ScoreSpec):
        super().__init__(spec)
        self.build()

    def renew(self, spec: ScoreSpec) -> None:
        before, self.spec = self.spec, spec
        if (before.scorer, before.reward_models, before.verifier) != (spec.scorer, spec.reward_models, spec.verifier):
            del self.scorer, self.verifier  # an old and a new reward model need not fit into memory together
            self.build()

    def build(self) -> None:
        spec = self.spec
        self.verifier = build_verifier(spec.verifier) if spec.verifier else None
        self.scorer = build_scorer(spec.scorer, spec.reward_models, self.verifier)

    def judge(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        """Scores for a strategy that chooses among drafts while it generates; one that is not finite never wins: -inf."""
        values = checked(f"scorer {self.spec.scorer.name}", self.scorer, prompts, answers, responses)
        return [float(value) if is_finite(value) else -math.inf for value in values]

    def process(self, shard: int, prompts: list[dict]) -> tuple[list[dict], list[dict], dict]:
        started = time.monotonic()
        by_id = {prompt["prompt_id"]: prompt for prompt in prompts}
        drafts = [draft for draft in self.answers(shard) if draft["prompt_id"] in by_id]
        asked = [by_id[draft["prompt_id"]] for draft in drafts]
        batch = ([p["prompt"] for p in asked], [p["answer"] for p in asked], [d["text"] for d in drafts])
        correct = checked("verifier", self.verifier, *batch) if self.verifier else [None] * len(drafts)
        name = f"scorer {self.spec.scorer.name}"
        scores = correct if self.scorer is self.verifier else checked(name, self.scorer, *batch)
        scored, rejected = [], []
        for draft, prompt, score, right in zip(drafts, asked, scores, correct, strict=True):
            if is_finite(score) and (right is None or is_finite(right)):
                row = {"draft_id": draft["draft_id"], "prompt_id": draft["prompt_id"]}
                scored.append({**row, "score": float(score), "correct": None if right is None else float(right)})
            else:
                reason = f"scorer gave {score!r}, verifier {right!r}: not a finite number"
                rejected.append(rows.reject({**prompt, "prompt_id": draft["draft_id"]}, "scores", reason))
        return scored, rejected, {"num_in": len(drafts), "score_seconds": round(time.monotonic() - started, 3)}

    def answers(self, shard: int) -> list[dict]:
        """The drafts of a shard that are scored, from a committed folder whose hashes are right."""
        folder = Path(self.spec.drafts) / shard_name(shard)
        manifest = read_manifest(folder, verify=True)
        if manifest is None:
            raise IntegrityError(f"{folder}: is not committed, but its scores were asked for; submit the same command again")
        return [draft for draft in rows.read_table(manifest.path("rows.parquet")) if draft["kind"] == "answer"]

    def reject_prompt(self, shard: int, prompt: dict, reason: str) -> list[dict]:
        """Every draft of the prompt."""
        drafts = [draft["draft_id"] for draft in self.answers(shard) if draft["prompt_id"] == prompt["prompt_id"]]
        return [rows.reject({**prompt, "prompt_id": draft_id}, self.stage, reason) for draft_id in drafts]


def scorer_pool(scorer: options.Scorer) -> PoolOptions:
    """The pool of scoring actors that the recipe asks for."""
    return PoolOptions(
        name="scorers",
        worker=ScoreWorker,
        actors=scorer.actors,
        cpus=scorer.cpus_per_actor,
        gpus=scorer.gpus_per_actor,
        restarts=scorer.max_restarts,
        stall_s=scorer.stall_s,
    )
