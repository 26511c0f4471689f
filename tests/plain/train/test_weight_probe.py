"""The figures of the probe, from log-probabilities written by hand."""

import pytest

from evolve_ray.train import weight_probe

SAMPLES = [[{"id": "a/1", "context": [1], "response": (2, 3), "logps": (-1.0, -2.0)}]]
LOGPS = {"now": [[-1.0, -2.5]], "first": [[-2.0, -3.0]]}


def test_models_in_one_folder_are_read_once_and_figures_are_those_of_each(monkeypatch):
    calls = []

    def call_all(actors, spec, verb, folder, samples):
        calls.append(folder)
        assert (actors, spec, verb, samples) == ("actors", ("cpu", "float32"), "token_logps", SAMPLES[0])
        return [LOGPS[folder]]

    monkeypatch.setattr(weight_probe, "call_all", call_all)
    models = {"policy": "now", "iteration": "first", "initial": "first"}
    figures = weight_probe.compare("actors", ("cpu", "float32"), models, SAMPLES)
    assert calls == ["now", "first"]
    assert figures == {
        "num_responses": 1, "num_tokens": 2, "mean_difference": pytest.approx(0.25), "max_difference": pytest.approx(0.5),
        "kl_iteration": pytest.approx(1.5), "kl_initial": pytest.approx(1.5),
    }  # fmt: skip
