"""Autoscaling counts rounds, not requests."""

import pickle
import types

import pytest

from evolve_ray.serve.scaling import by_rounds


@pytest.mark.parametrize(
    ("metrics", "queued", "wanted"),
    [({"running_rounds": {"a": 6.0, "b": 2.0}}, 0, 2.0), ({}, 0, 0.0), (None, 4, 1.0), ({"other": {"a": 99.0}}, None, 0.0)],
)
def test_replicas_follow_running_rounds(metrics, queued, wanted):
    config = types.SimpleNamespace(get_target_ongoing_requests=lambda: 4)
    context = types.SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=queued, config=config)
    assert by_rounds(context) == (wanted, {})


def test_serve_can_send_it_to_its_controller():
    assert pickle.loads(pickle.dumps(by_rounds)) is by_rounds
