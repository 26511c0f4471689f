"""The evaluate command on a real Ray with a fake engine: several models, all probes, resumed, and locked while it works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evolve_ray.store import rows
from evolve_ray.store.run import Run
from tests.tensors import zoo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models of one shape, prompts with answers, and a recipe."""
    root = tmp_path_factory.mktemp("evaluate")
    for number, name in enumerate(("before", "after")):
        zoo.save("llama_dropout", root / name, seed=number)
    rows.write_jsonl(
        root / "held.jsonl", [{"prompt": f"question {n}", "answer": ("aab", "bba", "aba")[n % 3]} for n in range(20)]
    )
    (root / "recipe.toml").write_text(
        f"""
        [model]
        path = "{root}/before"
        context_tokens = 200
        [prompts]
        path = "{root}/held.jsonl"
        answer_column = "answer"
        [template]
        name = "tiny"
        [sampling]
        max_tokens = 24
        [scorer]
        name = "verifier"
        cpus_per_actor = 0.1
        [verifier]
        name = "exact"
        [evaluation]
        answer_column = "answer"
        rounds = 3
        [evaluation.splits]
        held = "{root}/held.jsonl"
        [engine]
        name = "tests.fakes:ModelEngine"
        actors = 2
        cpus_per_actor = 0.5
        shard_prompts = 4
        [ray]
        num_cpus = 2
        dashboard = false
        """
    )
    return root


def command(place, out):
    models = [str(place / "before"), str(place / "after")]
    arguments = [
        sys.executable,
        str(ROOT / "jobs/evaluate.py"),
        *models,
        "--recipe",
        str(place / "recipe.toml"),
        "--out",
        str(out),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def done(place):
    result = command(place, place / "out")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return place / "out", result.stdout


def test_one_command_gives_one_table_one_json_and_one_page_of_both_models(done):
    out, said = done
    found = json.loads((out / "evaluation.json").read_text())
    assert [model["name"] for model in found["models"]] == ["before", "after"]
    for model in found["models"]:
        held = model["splits"]["held"]
        assert [figures["n"] for figures in held["rounds"].values()] == [20, 20, 20]
        assert set(held["probes"]) == {"foreign", "keep", "quality", "majority", "parallel", "longer"}
    assert found["foreign"] == "y1 of before"
    for part in ("y3 - y1", "after - before", "kept correct %", "equal tokens", "evaluation.html"):
        assert part in said
    assert "after - before" in (out / "evaluation.html").read_text()


def test_figures_are_those_of_the_committed_tables(done):
    out, _ = done
    found = json.loads((out / "evaluation.json").read_text())
    for model in found["models"]:
        folder = next((out / "models").glob(f"{model['name']}-*"))
        tables = {
            name: [
                row
                for path in sorted((folder / "chain" / name).glob("shard-*/rows.parquet"))
                for row in pq.read_table(path).to_pylist()
            ]
            for name in ("generations", "scores")
        }
        right = {row["draft_id"]: row["correct"] == 1.0 for row in tables["scores"]}
        for number in (1, 2, 3):
            here = [right[row["draft_id"]] for row in tables["generations"] if row["round"] == number]
            assert model["splits"]["held"]["rounds"][str(number)]["exact_match"]["mean"] == pytest.approx(sum(here) / 20)
        assert {row["model"] for row in tables["generations"]} == {model["model"]}


def test_second_call_recomputes_nothing(done, place):
    out, said = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("MANIFEST.json")}
    assert len(before) > 2 * 4
    again = command(place, out)
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("MANIFEST.json")} == before
    table = said[said.index("By round") :]
    assert again.stdout.endswith(table)
    assert "shards" not in again.stdout


def test_second_driver_is_told_who_works_there(done, place):
    out, _ = done
    with Run(out).locked():
        result = command(place, out)
    assert result.returncode == 3
    assert "another driver works on this run" in result.stderr
