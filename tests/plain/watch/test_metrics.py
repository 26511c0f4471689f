"""What metrics are set from events, evaluations and calls, with a list in place of Ray; and the dashboard that shows them."""

import json
import re

import pytest

from evolve_ray.pools.work import Work
from evolve_ray.store import rows
from evolve_ray.store.run import Run, Stage
from evolve_ray.watch.metrics import METRICS, Follower, Metrics
from tests.plain.processes import ROOT

DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "cluster/grafana").glob("*.json")}


class Told(dict):
    """Keeps the last value of each gauge and the sum of each counter; holds names and tags to METRICS."""

    def key(self, kind, name, tags):
        assert METRICS[name][0] == kind
        assert set(tags) == set(METRICS[name][2])
        return (name, *(tags[tag] for tag in METRICS[name][2]))

    def set(self, name, value, **tags):
        assert isinstance(value, int | float)  # as Ray demands
        self[self.key("gauge", name, tags)] = value

    def repeat(self):
        pass

    def forget(self, name):
        for key in [key for key in self if key[0] == name]:
            del self[key]

    def count(self, name, value, **tags):
        key = self.key("counter", name, tags)
        self[key] = self.get(key, 0) + value


class Gauge(list):
    def set(self, value, tags):
        self.append((value, tags))


def test_gauges_are_set_again_and_again_because_ray_forgets_them(tmp_path, monkeypatch):
    gauge = Gauge()
    monkeypatch.setattr(Metrics, "_in_ray", staticmethod(lambda: True))
    monkeypatch.setattr(Metrics, "_metric", lambda self, name: gauge)
    follower = Follower(Run(tmp_path), "r", Metrics())
    follower.metrics.set("evolve_iteration", 1, run="r")
    follower.metrics.set("evolve_iteration", 2, run="r")
    monkeypatch.setattr("evolve_ray.watch.metrics.INTERVAL_S", 0.01)
    follower.start()
    while len(gauge) < 5:
        pass
    follower.stop()
    assert gauge[0] == (1, {"run": "r"})
    assert gauge[1:] == [(2, {"run": "r"})] * len(gauge[1:])


@pytest.fixture
def follower(tmp_path):
    run = Run(tmp_path)
    run.event("shard", stage="generations", iteration=1, shard=9)  # of an earlier driver
    return Follower(run, "r", Told())


def test_figures_of_a_training_are_not_those_of_the_next(follower):
    follower.apply_events(
        [{"event": "stage_start", "stage": "checkpoint", "iteration": 0}, {"event": "training", "loss_direct": 2.0}]
    )
    assert follower.metrics["evolve_training", "r", "loss_direct"] == 2.0
    follower.apply_events(
        [{"event": "stage_start", "stage": "checkpoint", "iteration": 1}, {"event": "training", "loss_dpo": 0.5}]
    )
    assert [key for key in follower.metrics if key[0] == "evolve_training"] == [("evolve_training", "r", "loss_dpo")]


def test_stages_shards_and_steps_become_gauges(follower):
    run, told = follower.run, follower.metrics
    run.event("stage_start", stage="generations", iteration=2)
    run.event("shard", stage="generations", iteration=2, shard=0, num_shards=4)
    follower.poll()
    assert told["evolve_iteration", "r"] == 2
    assert told["evolve_stage", "r", "generations"] == 1
    assert (told["evolve_shards", "r", "done"], told["evolve_shards", "r", "waiting"]) == (1, 3)
    run.event("stage_end", stage="generations", iteration=2, seconds=1.0)
    run.event("stage_start", stage="checkpoint", iteration=2)
    run.event("training", iteration=2, key="a1b2", num_steps=9, step=3, num_pairs=8, loss=0.5, loss_dpo=0.25, learning_rate=1e-6)
    follower.poll()
    assert told["evolve_stage", "r", "generations"] == 0
    assert told["evolve_stage", "r", "checkpoint"] == 1
    assert (told["evolve_shards", "r", "done"], told["evolve_shards", "r", "waiting"]) == (0, 0)
    figures = {key[2]: value for key, value in told.items() if key[0] == "evolve_training"}
    assert figures == {"step": 3, "loss": 0.5, "loss_dpo": 0.25, "learning_rate": 1e-6}


def test_half_a_line_waits_for_its_end(follower):
    path = follower.run.root / "events.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"event": "stage_start", "stage": "pairs", ')
    follower.poll()
    assert follower.metrics == {}
    with open(path, "ab") as file:
        file.write(b'"iteration": 1}\n')
    follower.poll()
    assert follower.metrics["evolve_stage", "r", "pairs"] == 1


def test_committed_evaluations_are_shown_once_also_those_of_an_earlier_driver(follower):
    of_round = {"reward": {"mean": 0.5}, "exact_match": {"mean": 0.25}}
    summary = {"held": {"rounds": {"1": of_round, "2": {**of_round, "gain": {"reward": {"mean": 0.125}}}}}}
    for iteration, name in ((0, "base_evaluation"), (0, "evaluation"), (2, "evaluation")):
        stage = Stage(follower.run.iteration(iteration) / name, "evaluation", "key")
        rows.write_jsonl(stage.start() / "summary.jsonl", [summary])
        stage.commit()
    follower.poll()
    told = follower.metrics
    assert {key[2] for key in told} == {"base", "activation", "iteration 2"}
    assert told["evolve_evaluation", "r", "iteration 2", "held", "2", "gain_reward"] == 0.125
    assert told["evolve_evaluation", "r", "base", "held", "1", "exact_match"] == 0.25
    told.clear()
    follower.poll()
    assert told == {}


def test_the_thread_takes_what_is_written_before_it_is_stopped(follower):
    follower.start()
    follower.run.event("stage_start", stage="pairs", iteration=1)
    follower.stop()
    assert follower.metrics["evolve_stage", "r", "pairs"] == 1
    Follower(follower.run, "never started").stop()


def test_an_actor_counts_its_rows_tokens_and_idle_seconds():
    told = Told()
    work = Work("engines", told)
    work.record_call(
        10.0, 14.0, {"num_rows": 8, "num_rejected": 1, "num_tokens": 80, "num_prompt_tokens": 40, "num_cached_tokens": 30}
    )
    work.record_call(15.0, 16.0, None)
    assert told["evolve_actor_seconds", "engines", "busy"] == 5.0
    assert told["evolve_actor_seconds", "engines", "idle"] == 1.0
    assert (told["evolve_rows", "engines", "committed"], told["evolve_rows", "engines", "rejected"]) == (8, 1)
    assert [told["evolve_tokens", kind] for kind in ("generated", "prompt", "cached")] == [80, 40, 30]


def test_outside_of_ray_nothing_is_made():
    Work("engines").record_call(0.0, 1.0, {"num_rows": 1})


def queries():
    return [target["expr"] for board in DASHBOARDS.values() for panel in board["panels"] for target in panel["targets"]]


SUFFIX = {"counter": "_total", "histogram": "_bucket", "gauge": ""}  # of a metric at the port of Ray


def test_dashboards_ask_for_metrics_and_tags_that_exist():
    for query in queries():
        for name, suffix, tags in re.findall(r"ray_(evolve_\w+?)(_total|_bucket|)\{([^}]*)\}", query):
            assert suffix == SUFFIX[METRICS[name][0]], query
            assert set(re.findall(r"(\w+)(?:=~|!=|=)", tags)) <= {*METRICS[name][2], "SessionName"}, query
        for grouped in re.findall(r"by \(([^)]*)\)", query):
            name = re.search(r"ray_(evolve_\w+?)(?:_total|_bucket)", query).group(1)
            assert set(re.split(r",\s*", grouped)) <= {*METRICS[name][2], "le"}, query


def test_dashboards_show_every_metric_and_name_no_data_source():
    text = " ".join(queries())
    assert [name for name in METRICS if f"ray_{name}" not in text] == []
    assert len({board["uid"] for board in DASHBOARDS.values()}) == len(DASHBOARDS) == 2
    for board in DASHBOARDS.values():
        panels = board["panels"]
        assert {panel["datasource"] for panel in panels} == {"${datasource}"}
        assert len({panel["id"] for panel in panels}) == len(panels)
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
        assert len(set(places)) == len(places)
