"""The driver is killed during generation and during training; the same command again ends with the same pairs and losses."""

import shutil

import pytest

from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from tests.real.conftest import SMALL, assert_gone, fork, start

pytestmark = pytest.mark.long


def test_killed_in_generation_and_in_training_the_run_ends_as_its_undisturbed_twin(small):
    run = fork(small, "killed")
    # One engine instead of the twin's two: where a run computes must not show in what it computes.
    command = [*SMALL, "--iterations", "1", "engine.actors=1"]
    first = start(run, *command)
    first.wait_for(lambda events: sum(e["event"] == "shard" and e["stage"] == "generations" for e in events) >= 2)
    family = first.kill()
    shards = {path: path.stat().st_mtime_ns for path in (run / "iteration-01").glob(".generations-*/shard-*/MANIFEST.json")}
    assert shards, "the kill came after the stage was over"

    second = start(run, *command)
    saved = run / "iteration-01"
    second.wait_for(lambda events: list(saved.glob(".checkpoint-*/steps/step-000002/MANIFEST.json")))
    family += second.kill()
    assert not (saved / "checkpoint").exists(), "the kill came after the stage was over"
    generations = read_manifest(saved / "generations")
    for path, time_ns in shards.items():
        kept = saved / "generations" / path.parent.name / "MANIFEST.json"
        assert kept.stat().st_mtime_ns == time_ns, "a committed shard was computed again"

    # A reference that is lost as well is made again from the model that the training started from, not from step 2.
    shutil.rmtree(saved / "reference")
    third = start(run, *command)
    assert third.wait() == 0
    assert_gone(family)
    twin = small.run / "iteration-01"
    assert (saved / "pairs/pairs.parquet").read_bytes() == (twin / "pairs/pairs.parquet").read_bytes()
    assert generations.identity == read_manifest(twin / "generations").identity
    assert (saved / "reference/reference.parquet").read_bytes() == (twin / "reference/reference.parquet").read_bytes()
    losses = [[row["loss"] for row in rows.read_jsonl(folder / "checkpoint/training_log.jsonl")] for folder in (saved, twin)]
    assert losses[0] == losses[1]
    weights = [read_manifest(folder / "checkpoint").files["model.safetensors"]["sha256"] for folder in (saved, twin)]
    assert weights[0] == weights[1]
