"""Faults of a cluster: a submitted driver killed and stopped, a node lost in generations and in training, the head lost."""

import json
import os
import re
import signal
import time

import pytest
import yaml

from evolve_ray.pools.retries import FOLDER
from tests.faults.harness import (
    DRAFTED,
    ROLES,
    after_shards,
    arguments,
    ended,
    finish,
    first_steps_of_trainings,
    held_after_two_steps,
    in_stage,
    last_line,
    title,
)
from tests.faults.twin import assert_equals_twin, assert_kept, committed_files
from tests.real.cluster import await_, cluster_of
from tests.real.conftest import Command, assert_gone, fork, start

# What a file of Ray's autoscaler must have, although nodes of its local provider run none of them.
COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
    "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip


ENGINE_MARK = "VLLM_ENABLE_V1_MULTIPROCESSING"  # in the environment of engines alone
# What processes of ours call themselves: an actor that works has the name of its task.
HOSTS = ("ray::Host", "ray::generations: ", "ray::scores: ")
WORKERS = (*HOSTS, "ray::RayTrainWorker", "ray::TrainController")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # Ray fills half of a node before it takes another: here each gets an engine.
    spread = {"RAY_scheduler_spread_threshold": "0.1"}
    with cluster_of(tmp_path_factory.mktemp("cluster"), "head", "other", **spread) as found:
        yield found


def workers_of(cluster, driver):
    """Processes that do a job's work: Ray's own and idle ones stay with the cluster."""
    found = []
    for name in cluster.nodes:
        for process in cluster.family(name):
            if process.pid == driver or title(process).startswith(WORKERS):
                found.append(process)
    return found


def ranks_of(cluster):
    """The training workers of all nodes."""
    return [p for name in cluster.nodes for p in cluster.family(name) if ROLES["train worker"](p)]


def test_submitted_driver_that_is_killed_then_stopped_leaves_nobody_behind_and_is_resumed(cluster, small):
    run = fork(small, "submitted")
    events = Command(run, None, run).events  # type: ignore[arg-type]
    first = cluster.submit(run)
    await_(lambda: after_shards(1)(events()), 300, "no shard was generated")
    driver = json.loads((run / "LOCK").read_text())["pid"]
    left = workers_of(cluster, driver)
    assert len(left) >= 2, "driver and engine were at work"
    os.kill(driver, signal.SIGKILL)
    assert cluster.wait(first, 60) == "FAILED"
    assert_gone(left)
    before = committed_files(run)
    assert before

    second = cluster.submit(run)
    with held_after_two_steps(run, lambda: ranks_of(cluster)):
        left = workers_of(cluster, json.loads((run / "LOCK").read_text())["pid"])
        started = time.monotonic()
        cluster.stop_job(second)
        assert cluster.wait(second, 60) == "STOPPED"
        assert time.monotonic() - started < 30
    assert events()[-1]["event"] == "driver_failed", "the driver was not told, but killed"
    assert events()[-1]["error"].startswith("KeyboardInterrupt")
    assert_gone(left)
    assert_kept(before)

    third = cluster.submit(run)
    assert cluster.wait(third) == "SUCCEEDED", cluster.log(third)[-3000:]
    assert_kept(before)
    assert_equals_twin(run, small.run)


def test_run_that_loses_one_of_its_two_nodes_ends_on_the_other(cluster, small):
    run = fork(small, "one-node")
    events = Command(run, None, run).events  # type: ignore[arg-type]
    # An engine on each node; both fit on the one that is left.
    sizes = ("engine.actors=2", "engine.cpus_per_actor=0.8", "scorer.cpus_per_actor=0.1", "engine.release_for_training=true")
    job = cluster.submit(run, *sizes)
    await_(lambda: len(list(run.glob(f"iteration-01/.generations-*/{FOLDER}/actor-[01]"))) == 2, 300, "not both engines began")
    time.sleep(5)
    assert in_stage("generations")(events())
    assert any(ENGINE_MARK in process.environ() for process in cluster.family("other")), "no engine was at work there"
    cluster.kill("other")
    assert cluster.wait(job) == "SUCCEEDED", cluster.log(job)[-3000:]
    assert_equals_twin(run, small.run)


def test_run_that_loses_one_of_two_nodes_while_it_trains_goes_on_from_the_stored_step_on_the_next_node(cluster, small):
    run = fork(small, "train-node", keep=DRAFTED)
    events = Command(run, None, run).events  # type: ignore[arg-type]
    if "other" not in cluster.nodes:
        cluster.start("other")
    # A rank on each node: two do not fit on one, so the training waits for a node in place of the lost one.
    job = cluster.submit(run, "trainer.cpus_per_worker=1.2", "engine.release_for_training=true")
    with held_after_two_steps(run, lambda: ranks_of(cluster)) as ranks:
        assert [len(set(ranks) & set(cluster.family(name))) for name in ("head", "other")] == [1, 1]
        kept = committed_files(run)
        cluster.kill("other")
    cluster.start("next")
    assert cluster.wait(job) == "SUCCEEDED", cluster.log(job)[-3000:]
    assert first_steps_of_trainings(run)[-1] >= 2, "the training went on from a stored step"
    assert sum(event["event"] == "driver_start" for event in events()) == 1
    assert_kept(kept)
    assert_equals_twin(run, small.run)


def test_driver_whose_head_is_lost_ends_within_a_minute_naming_it_and_is_resumed(small, tmp_path, monkeypatch):
    run = fork(small, "no-head")
    with cluster_of(tmp_path, "head", port=9470) as cluster:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, cluster.environment[name])
        with ended(start(run, *arguments(), address=f"127.0.0.1:{cluster.port}")) as command:
            command.wait_for(after_shards(1))
            cluster.kill("head")
            started = time.monotonic()
            assert command.process.wait(120) == 5
            assert time.monotonic() - started < 60
            said = last_line(command)
            assert re.match(rf"error: ray: the head node at [0-9.]+:{cluster.port} is lost", said), said
            assert "submit the same command again" in said
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name)
    finish(run)
    assert_equals_twin(run, small.run)


def test_autoscaled_cluster_grows_for_a_run_and_shrinks_to_its_head(small, tmp_path, monkeypatch):
    """Ray's autoscaler with its provider of local nodes: one that is idle for a second, and that no request holds, goes."""
    run = fork(small, "autoscaled")
    worker = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    scaling = {name: {} for name in ("auth", "docker", "file_mounts")} | {name: [] for name in COMMANDS}
    provider = {"type": "fake_multinode", "use_node_id_as_ip": True}  # else all nodes are one to it, and none is ever idle
    scaling |= {"cluster_name": "fake", "provider": provider, "head_node_type": "ray.head.default"}
    scaling |= {"idle_timeout_minutes": 0.02, "upscaling_speed": 1.0, "max_workers": 2, "file_mounts_sync_continuously": False}
    scaling["available_node_types"] = {"ray.head.default": head, "worker": worker}
    (tmp_path / "scaling.yaml").write_text(yaml.safe_dump(scaling))
    with cluster_of(tmp_path, port=6379) as cluster:  # where the nodes of that provider look for it
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        cluster.start("head", f"--autoscaling-config={tmp_path / 'scaling.yaml'}", cpus=0, **fake)
        assert cluster.alive() == 1
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, cluster.environment[name])
        seen = [1]
        # No submitted job: nodes of that provider share a session folder, and one that goes takes the job's code along.
        with ended(start(run, *arguments(), address=f"127.0.0.1:{cluster.port}")) as command:
            while command.process.poll() is None:
                if (now := cluster.alive()) != seen[-1]:
                    seen.append(now)
                time.sleep(0.5)
            assert command.process.returncode == 0, command.log.read_text()[-3000:]
        print(f"nodes: {seen}")
        assert max(seen) > 1, "no node was added"
        # Ray Data's requests to the autoscaler outlive their driver by three minutes.
        await_(lambda: cluster.alive() == 1, 300, "nodes stayed without work")
    assert_equals_twin(run, small.run)
