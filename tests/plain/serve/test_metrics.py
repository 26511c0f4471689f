"""Counts of a replica, in its own text and through Ray's."""

import subprocess
import sys

import pytest

pytest.importorskip("prometheus_client")
CODE = """
from evolve_ray.serve import metrics
found = metrics.ServeMetrics()
found.round_started()
found.round_started()
found.round_ended(2, 0.5, 0.01, {"generated": 7, "prompt": 20, "cached": 0}, aborted=True)
found.request_ended("refined", 200, 0.7)
found.refined("rounds", 0.5, 1.0)
found.refined("unchanged", 1.0, 1.0)
found.refined("deadline", 1.0, None)
print(found.text().decode())
"""


def lines_of(folder=None):
    """What a replica shows; prometheus_client reads once where its files are, so each replica is a process."""
    env = {"PYTHONPATH": ".", "PATH": ""} | ({"PROMETHEUS_MULTIPROC_DIR": str(folder)} if folder else {})
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env, check=True)
    return set(done.stdout.splitlines())


def test_a_replica_shows_what_it_counted():
    lines = lines_of()
    for line in (
        "evolve_serve_running_rounds 1.0",
        "evolve_serve_aborted_rounds_total 1.0",
        'evolve_serve_round_tokens_total{kind="prompt",round="2"} 20.0',
        'evolve_serve_requests_total{kind="refined",status="200"} 1.0',
        'evolve_serve_first_token_seconds_count{round="2"} 1.0',
        'evolve_serve_effect_total{effect="better"} 1.0',
        'evolve_serve_effect_total{effect="equal"} 1.0',
        'evolve_serve_stopped_total{reason="deadline"} 1.0',
    ):
        assert line in lines, line
    assert not any("worse" in line for line in lines)
    assert not any('kind="cached"' in line for line in lines), "nothing was cached"


def test_replicas_of_a_node_show_the_counts_of_all_but_no_rounds_of_a_dead_one(tmp_path):
    folder = tmp_path / "counts"
    lines_of(folder)
    lines = lines_of(folder)
    assert 'evolve_serve_requests_total{kind="refined",status="200"} 2.0' in lines
    assert "evolve_serve_running_rounds 1.0" in lines
