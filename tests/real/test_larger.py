"""Engines and trainings of more than one process: tensor parallelism of two, and a node each for two engines and two ranks."""

import json

import psutil
import pytest

from evolve_ray.pools.retries import FOLDER
from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from tests.real.cluster import await_, cluster_of
from tests.real.conftest import SMALL, Command, fork, start

pytestmark = pytest.mark.long

TWO = ("engine.args.tensor_parallel_size=2", "engine.args.distributed_executor_backend=mp")


def engine_parts(command):
    """The processes of vLLM that hold a part of the model each."""
    family = psutil.Process(command.process.pid).children(recursive=True)
    return [process for process in family if "VLLM::Worker_TP" in " ".join(process.cmdline())]


def test_engine_of_two_processes_loads_new_weights_and_survives_the_loss_of_one(place):
    command = start(place / "tensor-parallel", *SMALL, *TWO, "--iterations", "1")
    command.wait_for(lambda events: any(e["event"] == "shard" and e["stage"] == "generations" for e in events), 900)
    parts = engine_parts(command)
    assert len(parts) == 2
    parts[1].kill()
    assert command.wait() == 0
    here = command.run / "iteration-01"
    (probe,) = rows.read_jsonl(here / "probe" / "probe.jsonl")
    assert probe["mean_difference"] < 1e-4, "nats a token, between the engine with new weights and a plain forward"
    assert probe["kl_iteration"] != 0.0, "the weights are other ones"
    drafts = read_manifest(here / "generations")
    assert (drafts.stats["num_in"], drafts.stats["num_rejected"]) == (64, 0)


def test_two_nodes_with_an_engine_and_a_rank_each_make_the_pairs_and_weights_of_one_node(small, tmp_path):
    run = fork(small, "two-nodes")
    with cluster_of(tmp_path, "head", "other", port=9471) as cluster:
        # More than half of a node each: so every node gets one engine, and then one rank.
        sizes = ("engine.actors=2", "engine.cpus_per_actor=1.2", "trainer.cpus_per_worker=1.2", "scorer.cpus_per_actor=0.1")
        job = cluster.submit(run, *sizes, "engine.release_for_training=true")
        marks = run / "iteration-01"
        await_(lambda: len(list(marks.glob(f".generations-*/{FOLDER}/actor-[01]"))) == 2, 600, "not both engines began")
        engines = [
            [process for process in cluster.family(name) if "VLLM_ENABLE_V1_MULTIPROCESSING" in process.environ()]
            for name in ("head", "other")
        ]
        assert all(engines), "no engine on one of the nodes"
        engines[1][0].kill()
        await_(lambda: any(e["event"] == "model_loaded" for e in events_of(run)), 900, "the training did not begin")
        ranks = [
            [p for p in cluster.family(name) if "RayTrainWorker" in p.name() + " ".join(p.cmdline())] for name in cluster.nodes
        ]
        assert [len(found) for found in ranks] == [1, 1]
        assert cluster.wait(job, 1500) == "SUCCEEDED", cluster.log(job)[-3000:]
    twin = small.run / "iteration-01"
    assert (marks / "pairs/pairs.parquet").read_bytes() == (twin / "pairs/pairs.parquet").read_bytes()
    weights = [read_manifest(folder / "checkpoint").files["model.safetensors"]["sha256"] for folder in (marks, twin)]
    assert weights[0] == weights[1]
    assert json.loads((run / "report.json").read_text())["ledger"]["clock"][-1]["engines"] > 0


def events_of(run):
    return Command(run, None, run).events()  # type: ignore[arg-type]
