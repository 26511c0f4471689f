"""Policy gradients through the real command: advantages, exact ratios at the start, the engine's numbers, metrics, report."""

import json
import shutil

import pytest

from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.shards import shard_name
from tests.real.conftest import SMALL, fork, start

pytestmark = pytest.mark.long
POLICY_GRADIENT = ["selection.name=advantages", "training.objective=policy_gradient", "training.nll=0"]


def run(small, name, *more):
    """One iteration of policy gradients on the small run's activated model; the folder of the iteration."""
    folder = fork(small, name)
    (folder / "config.json").unlink()
    command = start(folder, *SMALL, *POLICY_GRADIENT, *more, "--iterations", "1")
    assert command.wait() == 0
    report = json.loads((folder / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["base", "activation", "iteration 1"]
    assert (folder / "report.html").exists()
    return folder / "iteration-01"


def test_independent_answers_have_advantages_and_the_ratio_is_exactly_1_at_first(small):
    here = run(small, "parallel-pg", "strategy.name=parallel", "strategy.samples=4", "training.refine_weight=0")
    pairs = rows.read_table(here / "pairs" / "pairs.parquet")
    scores = {row["draft_id"]: row["score"] for row in rows.read_table(here / "scores" / shard_name(0) / "rows.parquet")}
    assert all(pair["numbers"]["refined"] == 0.0 and pair["numbers"]["advantage"] != 0.0 for pair in pairs)
    by_prompt = {}
    for row in rows.read_table(here / "generations" / shard_name(0) / "rows.parquet"):
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    checked = 0
    for pair in pairs:
        group = by_prompt.get(pair["prompt_id"], [])
        same = [scores[row["draft_id"]] for row in group if row["text"] == pair["chosen"] and row["finish_reason"] == "stop"]
        if group and len(group) == len([row for row in group if row["draft_id"] in scores]):
            mean = sum(scores[row["draft_id"]] for row in group) / 4
            assert pair["numbers"]["advantage"] == pytest.approx(len(same) * (pair["chosen_score"] - mean) * 4 / 3)
            checked += 1
    assert checked > 10
    log = rows.read_jsonl(here / "checkpoint" / "training_log.jsonl")
    assert (log[0]["ratio"], log[0]["clipped"], log[0]["kl"]) == (1.0, 0.0, 0.0), "to the bit, over two ranks"
    assert log[0]["loss"] == pytest.approx(-log[0]["advantage"])
    assert all(entry["ratio"] != 1.0 for entry in log[1:])
    assert {"loss", "loss_gradient", "ratio", "clipped", "kl", "advantage", "gradient_norm"} <= set(log[0])
    assert read_manifest(here / "reference").stats["num_rows"] == len(pairs)


def test_chains_by_token_with_the_engines_log_probabilities(small):
    """Tokens of drafts and of the reference are as many, engine and trainer agree on them, and each ratio is 1 at first."""
    token = [
        "strategy.name=chains",
        "strategy.rounds=2",
        "strategy.samples=2",
        "sampling.logps=true",
        "training.objective_args.level=token",
        "training.objective_args.mismatch=truncate",
    ]
    here = run(small, "chain-pg", *token)
    drafts = rows.read_table(here / "generations" / shard_name(0) / "rows.parquet")
    assert all(len(row["logps"]) == row["num_tokens"] for row in drafts)
    pairs = rows.read_table(here / "pairs" / "pairs.parquet")
    reference = rows.read_table(here / "reference" / "reference.parquet")
    assert {pair["numbers"]["refined"] for pair in pairs} == {0.0, 1.0}
    for pair, row in zip(pairs, reference, strict=True):
        name = "chosen_after_rejected" if pair["numbers"]["refined"] else "chosen"
        assert row[rows.token_column(name)] == pytest.approx(pair["chosen_logps"], abs=1e-3)
        assert sum(row[rows.token_column(name)]) == pytest.approx(row[name], abs=1e-4)
    log = rows.read_jsonl(here / "checkpoint" / "training_log.jsonl")
    assert (log[0]["ratio"], log[0]["clipped"], log[0]["kl"]) == (1.0, 0.0, 0.0)
    assert 0 < log[0]["mismatch"] < 1e-4
    assert log[0]["mismatch"] <= log[0]["largest_mismatch"] < 1e-2
    assert log[0]["mismatch_factor"] == pytest.approx(1.0, abs=1e-3)
    evaluated = next((here / "evaluation").rglob("generations/**/rows.parquet"), None)
    assert evaluated is None or "logps" not in rows.read_table(evaluated)[0], "an evaluation does not keep them"
    shutil.rmtree(here.parent)
