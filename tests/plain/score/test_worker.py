"""A shard is scored with what its strategy gave; a draft without a score is rejected by name; a judge's costs are counted."""

import pytest

from evolve_ray.config import options
from evolve_ray.score.worker import ScoreSpec, ScoreWorker
from evolve_ray.store import rows
from evolve_ray.store.manifest import commit
from tests.plain.score.test_judge import SPEC, ListEngine


@pytest.fixture
def shard(tmp_path):
    """A committed shard of three answers and a verdict to one prompt; makes the worker that scores it."""
    prompt = {"prompt_id": "p", "prompt": "q", "answer": "fine", "split": "train", "file": "f", "line": 1, "num_tokens": 1}
    rows.write_table(tmp_path / "prompts.parquet", [prompt], rows.PROMPT)
    place = {"prompt_id": "p", "split": "train", "round": 1, "parent_id": None, "finish_reason": "stop", "seed": 1, "model": "m"}
    counts = {"num_prompt_tokens": 1, "num_tokens": 1}
    answers = [
        {"draft_id": f"d{n}", "sample": n, "kind": "answer", "text": text, **place, **counts}
        for n, text in enumerate(("fine", "silent", "fine too"))
    ]
    answers[0]["strategy_score"] = 7.5
    answers[1]["strategy_score"] = 2.0
    verdict = {**answers[2], "draft_id": "v0", "kind": "verdict", "text": "Rating: 8", "strategy_score": None}
    folder = tmp_path / "drafts" / ".0"
    folder.mkdir(parents=True)
    table = [{**row, "strategy_score": row.get("strategy_score")} for row in [*answers, verdict]]
    rows.write_table(folder / "rows.parquet", table, rows.GENERATION, rows.DRAFT_DETAILS)
    rows.write_jsonl(folder / "rejected.jsonl", [])
    commit(folder, tmp_path / "drafts" / "shard-00000", stage="shard", key="k", num_in=1, num_rows=4, num_rejected=0)

    def score(scorer, **more):
        spec = ScoreSpec(
            prompts=str(tmp_path / "prompts.parquet"), drafts=str(tmp_path / "drafts"), work=str(tmp_path), key="k",
            shard_prompts=1, scorer=scorer, reward_models={}, verifier=options.Verifier(), **more,
        )  # fmt: skip
        return ScoreWorker(spec).process(0, [prompt])

    return score


def test_the_scores_of_a_strategy_stand_beside_the_verifiers_values(shard):
    scored, rejected, stats = shard(options.Scorer(name="strategy"))
    assert [(row["draft_id"], row["score"], row["correct"]) for row in scored] == [("d0", 7.5, 1.0), ("d1", 2.0, 0.0)]
    assert [(row["id"], row["reason"]) for row in rejected] == [("d2", "has no score: the strategy gave it none")]
    assert stats["num_in"] == 3
    assert "num_judge_asks" not in stats


def test_votes_are_counted_within_the_shard(shard):
    scored, _, _ = shard(options.Scorer(name="vote"))
    assert [row["score"] for row in scored] == [1 / 3] * 3


def test_a_judges_costs_are_in_the_counts_of_the_shard(shard, monkeypatch):
    monkeypatch.setattr("evolve_ray.score.judge.JudgeEngine", ListEngine)
    scored, rejected, stats = shard(options.Scorer(name="judge", args={"model": "policy"}), judge=SPEC)
    assert [(row["draft_id"], row["score"]) for row in scored] == [("d0", 8.0), ("d2", 8.0)]
    assert [row["id"] for row in rejected] == ["d1"]
    assert (stats["num_judge_asks"], stats["num_unparsable"], stats["num_judge_tokens"]) == (3, 1, 7)
