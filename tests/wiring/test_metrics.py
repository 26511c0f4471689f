"""The metrics of a real Ray at the port that its own Prometheus configuration names."""

import time
import types
import urllib.request

import pytest

from evolve_ray.pools.actors import Host
from evolve_ray.store.run import Run
from evolve_ray.watch.metrics import Follower, Metrics


class Counting:
    """A worker whose shards hold what the specification says."""

    def __init__(self, spec):
        self.spec = spec

    def commit_shard(self, shard):
        return {"num_rows": 3, "num_rejected": 1, "num_tokens": 50, "num_prompt_tokens": 20, "num_cached_tokens": 5}


@pytest.fixture
def ray_port():
    """A local Ray and the address of its metrics."""
    import ray

    ray.init(
        address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
        logging_level="error", _system_config={"metrics_report_interval_ms": 1000},
    )  # fmt: skip
    yield ray, f"http://{ray.nodes()[0]['NodeManagerAddress']}:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    ray.shutdown()


def test_actors_and_driver_are_seen_by_prometheus(ray_port, tmp_path):
    ray, url = ray_port
    actor = ray.remote(Host).options(num_cpus=0).remote(Counting, name="engines")
    for shard in range(2):
        ray.get(actor.call.remote(types.SimpleNamespace(work=str(tmp_path)), "commit_shard", shard))
    run = Run(tmp_path)
    follower = Follower(run, "watched", Metrics())
    run.event("stage_start", stage="checkpoint", iteration=1)
    run.event("training", iteration=1, step=1, num_steps=2, num_pairs=4, loss=0.75)
    follower.poll()
    wanted = {
        'ray_evolve_tokens_total{kind="generated"}': 100.0,
        'ray_evolve_rows_total{kind="rejected",pool="engines"}': 2.0,
        'ray_evolve_training{figure="loss",run="watched"}': 0.75,
        'ray_evolve_stage{run="watched",stage="checkpoint"}': 1.0,
    }
    deadline = time.monotonic() + 90
    while (found := scrape(url, wanted)) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(1)


def scrape(url, wanted):
    """Values of the wanted metrics; labels that Ray adds are left out."""
    try:
        text = urllib.request.urlopen(url, timeout=10).read().decode()
    except OSError:
        return {}
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            ours = ("figure", "kind", "pool", "run", "stage")
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()) if name in ours)
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return {name: value for name, value in found.items() if name in wanted}
