"""Scoring: actors that host a reward model or a verifier and put a number on every draft."""

import itertools
import math
import numbers
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from evolve_ray import config as options
from evolve_ray import rows
from evolve_ray.chat import Chat
from evolve_ray.errors import IntegrityError
from evolve_ray.refine import find_plug
from evolve_ray.shards import PoolOptions, ShardWorker, shard_name
from evolve_ray.store import read_manifest

VERSION = 1


class Scorer(Protocol):
    """A batch of (prompt, answer, response) -> one number each; higher is better."""

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]: ...


class ExactMatch:
    """1.0 if the response equals the answer, surrounding white space apart, else 0.0."""

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [float(a is not None and r.strip() == a.strip()) for a, r in zip(answers, responses, strict=True)]


class RewardModel:
    """A Hugging Face sequence classifier with one output; its raw logit is the score, with no softmax or sigmoid.

    The conversation `[user: prompt, assistant: response]` is rendered by the reward model's own chat template. Rows are
    scored in fixed batches in their given order, so a score does not depend on how many actors there are.
    """

    def __init__(self, options: options.Scorer, folder: str):
        import torch
        from transformers import AutoModelForSequenceClassification

        self.torch = torch
        self.batch_size, self.max_tokens = options.batch_size, options.max_tokens
        self.chat = Chat(folder, "scorer.model")
        self.device = torch.device("cuda" if options.gpus_per_actor else "cpu")
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=getattr(torch, options.dtype), trust_remote_code=False
        )
        self.pads_itself = model.config.pad_token_id is not None
        self.model = model.to(self.device).eval()

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        scores: list[float] = []
        ids = [
            self.chat.context_ids(({"role": "user", "content": p}, {"role": "assistant", "content": r}), generate=False)
            for p, r in zip(prompts, responses, strict=True)
        ]
        for first in range(0, len(ids), self.batch_size):
            batch = ids[first : first + self.batch_size]
            # An answer too long for the reward model is not cut and scored: it gets no number, which rejects the row.
            fits = [row for row in batch if len(row) <= self.max_tokens]
            values = iter(self._forward(fits) if fits else [])
            scores += [next(values) if len(row) <= self.max_tokens else math.nan for row in batch]
        return scores

    def _forward(self, batch: list[list[int]]) -> list[float]:
        torch = self.torch
        width = max(map(len, batch))
        if not self.pads_itself:
            # The classifier reads the last token that is not padding: pad with a token that ends none of these rows.
            last = {row[-1] for row in batch}
            self.model.config.pad_token_id = next(token for token in itertools.count() if token not in last)
        ids_BT = torch.full((len(batch), width), self.model.config.pad_token_id)
        mask_BT = torch.zeros((len(batch), width), dtype=torch.long)
        for row, tokens in enumerate(batch):  # padded on the right: the classifier reads the last token that is no padding
            ids_BT[row, : len(tokens)] = torch.tensor(tokens)
            mask_BT[row, : len(tokens)] = 1
        with torch.inference_mode():
            logits = self.model(input_ids=ids_BT.to(self.device), attention_mask=mask_BT.to(self.device)).logits
        return logits[:, 0].float().cpu().tolist()


VERIFIERS: dict[str, Callable[[], Scorer]] = {"exact": ExactMatch}


def build_verifier(verifier: options.Verifier) -> Scorer:
    return find_plug(VERIFIERS, verifier.name, "verifier.name")()


@dataclass(frozen=True)
class ScoreSpec:
    """Everything a scoring actor needs, picklable. `drafts` is where the generation stage keeps its shards."""

    prompts: str
    drafts: str
    work: str
    key: str
    shard_prompts: int
    scorer: options.Scorer
    reward_model: str
    verifier: options.Verifier | None


class ScoreWorker(ShardWorker):
    """Scores one shard of drafts per call."""

    schema = rows.SCORE

    def __init__(self, spec: ScoreSpec):
        super().__init__(spec)
        self.build()

    def renew(self, spec: ScoreSpec) -> None:
        before, self.spec = self.spec, spec
        if (before.scorer, before.reward_model, before.verifier) != (spec.scorer, spec.reward_model, spec.verifier):
            self.build()

    def build(self) -> None:
        spec = self.spec
        self.verifier = build_verifier(spec.verifier) if spec.verifier else None
        if spec.scorer.name == "reward_model":
            self.scorer: Scorer | None = RewardModel(spec.scorer, spec.reward_model)
        else:
            self.scorer = None if spec.scorer.name == "verifier" else find_plug({}, spec.scorer.name, "scorer.name")()

    def process(self, shard: int, prompts: list[dict]) -> tuple[list[dict], list[dict], dict]:
        started = time.monotonic()
        folder = Path(self.spec.drafts) / shard_name(shard)
        manifest = read_manifest(folder, verify=True)
        if manifest is None:
            raise IntegrityError(f"{folder}: is not committed, but its scores were asked for; submit the same command again")
        drafts = rows.read_table(manifest.path("rows.parquet"))
        by_id = {prompt["prompt_id"]: prompt for prompt in prompts}
        asked = [by_id[draft["prompt_id"]] for draft in drafts]
        batch = ([p["prompt"] for p in asked], [p["answer"] for p in asked], [d["text"] for d in drafts])
        correct = self._checked("verifier", self.verifier, batch) if self.verifier else [None] * len(drafts)
        scores = self._checked("scorer", self.scorer, batch) if self.scorer else correct
        scored, rejected = [], []
        for draft, prompt, score, right in zip(drafts, asked, scores, correct, strict=True):
            if is_finite(score) and (right is None or is_finite(right)):
                row = {"draft_id": draft["draft_id"], "prompt_id": draft["prompt_id"]}
                scored.append({**row, "score": float(score), "correct": None if right is None else float(right)})
            else:
                reason = f"scorer gave {score!r}, verifier {right!r}: not a finite number"
                rejected.append(rows.reject({**prompt, "prompt_id": draft["draft_id"]}, "scores", reason))
        return scored, rejected, {"num_in": len(drafts), "score_seconds": round(time.monotonic() - started, 3)}

    @staticmethod
    def _checked(name: str, scorer: Scorer, batch: tuple) -> list[float]:
        values = list(scorer(*batch))
        if len(values) != len(batch[0]):
            raise IntegrityError(f"{name}: gave {len(values)} values for {len(batch[0])} responses; it must give one for each")
        return values


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def pool(scorer: options.Scorer) -> PoolOptions:
    """The pool of scoring actors that the recipe asks for."""
    return PoolOptions(
        name="scorers",
        worker=ScoreWorker,
        actors=scorer.actors,
        cpus=scorer.cpus_per_actor,
        gpus=scorer.gpus_per_actor,
        restarts=scorer.max_restarts,
    )
