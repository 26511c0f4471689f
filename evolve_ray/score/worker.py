"""The scoring actors: each hosts the recipe's scorer and verifier and scores shards of drafts."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.config import options
from evolve_ray.errors import IntegrityError
from evolve_ray.pools.actors import PoolOptions
from evolve_ray.pools.worker import ShardWorker
from evolve_ray.score.combined import build_scorer, local_judge
from evolve_ray.score.judge import Judge
from evolve_ray.score.judge_engine import ENV, JudgeSpec
from evolve_ray.score.protocol import call_scorer, is_finite
from evolve_ray.score.verifiers import build_verifier
from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.shards import shard_name

VERSION = 3


@dataclass(frozen=True)
class ScoreSpec:
    """Everything that a scoring actor needs, picklable. `drafts` is the folder with the shards of the generation stage."""

    prompts: str
    drafts: str
    work: str
    key: str
    shard_prompts: int
    scorer: options.Scorer
    reward_models: dict[str, str]  # the names in the recipe -> local folders
    verifier: options.Verifier | None
    day: str = ""  # the date that the chat templates of the reward models print
    judge: JudgeSpec | None = None  # the engine of a judge without a server


class ScoreWorker(ShardWorker):
    """Scores one shard of drafts per call. Only answers get scores, not critiques."""

    schema = rows.SCORE
    stage = "scores"

    def __init__(self, spec: ScoreSpec):
        super().__init__(spec)
        self.build()

    def renew(self, spec: ScoreSpec) -> None:
        previous, self.spec = self.spec, spec
        names = ("scorer", "reward_models", "verifier", "day")
        if any(getattr(previous, name) != getattr(spec, name) for name in names):
            del self.scorer, self.verifier  # first, so that an old and a new reward model are never in memory together
            self.build()
        elif isinstance(self.scorer, Judge) and spec.judge and spec.judge != previous.judge:
            self.scorer.reload(spec.judge)

    def build(self) -> None:
        spec = self.spec
        self.verifier = build_verifier(spec.verifier) if spec.verifier else None
        self.scorer = build_scorer(spec.scorer, spec.reward_models, self.verifier, spec.day, spec.verifier, spec.judge)

    def score_texts(self, prompts: list[Any], answers: list[str | None], responses: list[str]) -> list[float]:
        """Scores for a strategy that asks while it generates; a score that is not finite becomes -inf: it never wins."""
        values = call_scorer(f"scorer {self.spec.scorer.name}", self.scorer, prompts, answers, responses)
        return [float(value) if is_finite(value) else -math.inf for value in values]

    def process(self, shard: int, prompts: list[dict]) -> tuple[list[dict], list[dict], dict]:
        started = time.monotonic()
        by_id = {prompt["prompt_id"]: prompt for prompt in prompts}
        drafts = [draft for draft in self.answers(shard) if draft["prompt_id"] in by_id]
        draft_prompts = [by_id[draft["prompt_id"]] for draft in drafts]
        batch = ([p["prompt"] for p in draft_prompts], [p["answer"] for p in draft_prompts], [d["text"] for d in drafts])
        verifier = f"verifier {self.spec.verifier.name}" if self.spec.verifier else ""
        correct = call_scorer(verifier, self.verifier, *batch) if self.verifier else [None] * len(drafts)
        name = f"scorer {self.spec.scorer.name}"
        scores: list[Any]
        if self.spec.scorer.name == "strategy":
            scores = [draft.get("strategy_score") for draft in drafts]
        else:
            scores = correct if self.scorer is self.verifier else call_scorer(name, self.scorer, *batch)
        scored, rejected = [], []
        for draft, prompt, score, right in zip(drafts, draft_prompts, scores, correct, strict=True):
            if is_finite(score) and (right is None or is_finite(right)):
                row = {"draft_id": draft["draft_id"], "prompt_id": draft["prompt_id"]}
                scored.append({**row, "score": float(score), "correct": None if right is None else float(right)})
            else:
                reason = f"scorer gave {score!r}, verifier {right!r}: not a finite number"
                if score is None and self.spec.scorer.name == "strategy":
                    reason = "has no score: the strategy gave it none"
                rejected.append(rows.reject({**prompt, "prompt_id": draft["draft_id"]}, "scores", reason))
        counts = self.scorer.take_counts() if isinstance(self.scorer, Judge) else {}
        return scored, rejected, {"num_in": len(drafts), "score_seconds": round(time.monotonic() - started, 3), **counts}

    def answers(self, shard: int) -> list[dict]:
        """The answers among the drafts of a shard. Raises IntegrityError if it is not committed or its hashes differ."""
        folder = Path(self.spec.drafts) / shard_name(shard)
        manifest = read_manifest(folder, verify=True)
        if manifest is None:
            raise IntegrityError(f"{folder}: is not committed, so it cannot be scored; submit the same command again")
        return [draft for draft in rows.read_table(manifest.path("rows.parquet")) if draft["kind"] == "answer"]

    def reject_prompt(self, shard: int, prompt: dict, reason: str) -> list[dict]:
        """The rejected rows of all drafts of a prompt."""
        drafts = [draft["draft_id"] for draft in self.answers(shard) if draft["prompt_id"] == prompt["prompt_id"]]
        return [rows.reject({**prompt, "prompt_id": draft_id}, self.stage, reason) for draft_id in drafts]


def scorer_pool(scorer: options.Scorer, engine: options.Engine | None = None) -> PoolOptions:
    """The pool of scoring actors that the recipe asks for; with `engine`, the environment of its engines is theirs too."""
    judge = ENV | {name: str(value) for name, value in engine.env.items()} if engine and local_judge(scorer) else {}
    return PoolOptions(
        name="scorers",
        worker=ScoreWorker,
        actors=scorer.actors,
        cpus=scorer.cpus_per_actor,
        gpus=scorer.gpus_per_actor,
        restarts=scorer.max_restarts,
        stall_s=scorer.stall_s,
        **({"env": judge} if judge else {}),
    )
