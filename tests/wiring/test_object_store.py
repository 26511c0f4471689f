"""The real command with a run in an object store that fails now and then: killed, and continued on another machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.stores import at, environment, place, proxy, request, server, way
from tests.wiring.test_pipeline import make_folder, recipe_text

__all__ = ["at", "place", "proxy", "server", "way"]
ROOT = Path(__file__).resolve().parents[2]
NUM_SHARDS = 6
PAIRS = "iteration-01/pairs"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe whose drafts, scores and pairs need no real engine; its training is never come to."""
    root = make_folder(tmp_path_factory.mktemp("inputs"), 4 * NUM_SHARDS)
    ray = "[ray]\nnum_cpus = 2\ndashboard = false\n"
    (root / "recipe.toml").write_text(recipe_text(root, "SlowEngine", 4 * NUM_SHARDS) + ray)
    return root / "recipe.toml"


class Driver:
    """`python jobs/iterate.py` as a child; whatever it started ends with the block."""

    def __init__(self, recipe, log, port, *arguments):
        self.log = log
        given = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | environment(port)
        with open(log, "wb") as output:
            command = [sys.executable, ROOT / "jobs/iterate.py", recipe, *map(str, arguments)]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=given)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        for process in [*family, *([self.process] if self.process.poll() is None else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(20)

    def wait_for(self, found, seconds=240.0):
        ends = time.monotonic() + seconds
        while not found():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < ends, "the awaited moment did not come"
            time.sleep(0.1)

    def end(self, number):
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.mark.long
def test_run_that_is_killed_goes_on_in_another_folder_with_the_pairs_of_a_run_on_a_disk(recipe, proxy, at, place, tmp_path):
    twin, here, there = tmp_path / "twin", tmp_path / "here", tmp_path / "there"
    with Driver(recipe, tmp_path / "twin.log", proxy.port, "--run", twin) as driver:
        driver.wait_for((twin / PAIRS / "MANIFEST.json").exists)
        assert driver.end(signal.SIGTERM) == 143

    failed = set()

    def fail_once(method, path):
        once = (method, path.partition("?")[0])
        if method != "PUT" or once in failed:
            return ""
        failed.add(once)
        return ("500", "cut", "lost")[len(failed) % 3]

    proxy.fault = fail_once

    def shards():
        return {Path(name).parent.name for name in at(place).names() if "/.scores-" in name and name.endswith("MANIFEST.json")}

    with Driver(recipe, tmp_path / "here.log", proxy.port, "--run", place, "--work", here) as driver:
        driver.wait_for(lambda: len(shards()) >= 2)
        family = psutil.Process(driver.process.pid).children(recursive=True)
        driver.end(signal.SIGKILL)
    kept = shards()
    assert 2 <= len(kept) < NUM_SHARDS, "the kill came after the stage was over"

    with Driver(recipe, tmp_path / "early.log", proxy.port, "--run", place, "--work", there) as driver:
        assert driver.process.wait(120) == 3
        assert f'"pid": {holder(at(place))["pid"]}' in driver.log.read_text()
    at(place).put("LOCK/000001.json", json.dumps(holder(at(place)) | {"beat": 0.0}).encode())  # the time until it is stale

    with Driver(recipe, tmp_path / "there.log", proxy.port, "--run", place, "--work", there) as driver:
        driver.wait_for(lambda: f"{PAIRS}/MANIFEST.json" in at(place).names())
        assert driver.end(signal.SIGTERM) == 143
    assert {"500", "cut", "lost"} <= set(proxy.fired)
    events = [json.loads(line) for line in (there / "events.jsonl").read_text().splitlines()]
    started = [number for number, event in enumerate(events) if event["event"] == "driver_start"]
    assert len(started) == 2, "the events of the first machine are gone"
    done = [event["shard"] for event in events[started[1] :] if event["event"] == "shard"]
    assert sorted(done) == [number for number in range(NUM_SHARDS) if f"shard-{number:05d}" not in kept]
    _, body, _ = request(proxy.server, "GET", f"/{place.removeprefix('s3://')}/{PAIRS}/pairs.parquet")
    assert body == (there / PAIRS / "pairs.parquet").read_bytes() == (twin / PAIRS / "pairs.parquet").read_bytes()
    _, alive = psutil.wait_procs(family, timeout=90)
    assert not alive, f"orphans: {[process.name() for process in alive]}"


def holder(store):
    return json.loads(store.read("LOCK/000001.json"))
