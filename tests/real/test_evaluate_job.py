"""Base and checkpoint of a small run side by side: one command, one table, one page; and a pair explained."""

import json
import subprocess
import sys

import pytest

from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import read_manifest
from tests.real.conftest import ROOT


def call(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def done(small):
    out = small.run.with_name("evaluation")
    names = [f"{small.run}@base", small.run]
    result = call("jobs/evaluate.py", *names, "--out", out, "evaluation.limit=16")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out, result.stdout


def test_all_models_are_in_one_table_one_json_and_one_page(done):
    out, said = done
    found = json.loads((out / "evaluation.json").read_text())
    assert [model["name"] for model in found["models"]] == ["small@base", "small@1"]
    for model in found["models"]:
        assert set(model["splits"]) == {"heldout", "long", "desc"}
        for split in model["splits"].values():
            assert set(split["probes"]) == {"foreign", "keep", "quality", "majority", "parallel", "longer"}
            for figures in split["rounds"].values():
                assert figures["exact_match"]["low"] <= figures["exact_match"]["mean"] <= figures["exact_match"]["high"]
                moved = figures.get("against_first")
                ways = ("wrong_to_right", "right_to_wrong", "kept_right", "kept_wrong")
                assert moved is None or sum(moved[way] for way in ways) == figures["n"]
            assert split["probes"]["longer"]["n"] == split["num_prompts"]
            assert split["probes"]["longer"]["max_tokens"] == 96, "four rounds of 24 tokens have room in the context"
            assert split["probes"]["keep"]["n"] == split["num_prompts"], "every answer is right in the verifier's eyes"
    assert len(found["differences"]) == 1
    for part in ("small@1 - small@base", "y4 - y1", "equal tokens", "one answer of up to 96 tokens"):
        assert part in said
        assert part in (out / "evaluation.html").read_text()


def test_chains_are_those_of_the_runs_own_evaluation(small, done):
    """The same prompts and seeds through the same engine: the texts of the common prompts are the same."""
    out, _ = done
    own = read_manifest(small.run / "iteration-01" / "evaluation")
    texts = {
        (row["prompt_id"], row["round"]): row["text"]
        for name in own.files
        if name.startswith("generations/shard-") and name.endswith("rows.parquet")
        for row in rows.read_table(own.path(name))
    }
    folder = next((out / "models").glob("small@1-*")) / "chain" / "generations"
    here = {(row["prompt_id"], row["round"]): row["text"] for row in shards.read_rows(read_manifest(folder))}
    assert here
    same = [texts[place] == text for place, text in here.items()]
    assert sum(same) >= 0.95 * len(same), "batches of another size may round a sum differently, no more"


def test_foreign_drafts_are_the_bases_for_every_model(done):
    out, _ = done
    first = []
    for folder in sorted((out / "models").iterdir()):
        table = shards.read_rows(read_manifest(folder / "foreign" / "generations"))
        first.append({row["prompt_id"]: row["text"] for row in table if row["round"] == 1})
    assert len(first) == 2
    assert first[0] == first[1]


def test_a_training_pair_is_explained(small):
    pair = rows.read_table(small.run / "iteration-01" / "pairs" / "pairs.parquet")[0]
    result = call("jobs/explain.py", small.run, pair["pair_id"][:12])
    assert result.returncode == 0, result.stderr
    for part in (pair["pair_id"], pair["chosen_id"], "chosen_after_rejected", "iteration-00/checkpoint", "train.jsonl:"):
        assert part in result.stdout
