"""What a run tells its trackers, read back through their own clients; a resumed run tells each point once."""

import json
import math
import struct
import time

import pytest

from evolve_ray.config.load import load
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError
from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.run import Run, Stage
from evolve_ray.watch import tracker_clients, trackers
from evolve_ray.watch.tracker_clients import Row
from evolve_ray.watch.trackers import Trackers

STEPS = {0: 3, 1: 4, 2: 2}  # optimiser updates of the activation and of two iterations


def interval(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def model(name, iteration, mean):
    figures = {str(number): {"n": 8, "reward": interval(mean), "num_cut": number} for number in (1, 2)}
    split = {"num_prompts": 8, "rounds": figures, "gain": {"reward": interval(mean / 2)}}
    made = {"name": name, "iteration": iteration, "model": name, "splits": {"held": split}}
    if iteration:
        made |= {"drift": {"cut_rate": 0.25, "tokens_ratio": None}, "probe": None}
        made["decision"] = {"action": "continue", "reason": "on <held>, it still improves"}
    return made


def steps_of(iteration, first=0, tag=0.0):
    return [{"step": n, "loss": 1.0 / (n + 1) + iteration + tag, "learning_rate": 1e-4} for n in range(first, STEPS[iteration])]


def commit_training(run, iteration, key=None):
    stage = Stage(run.iteration(iteration) / "checkpoint", "checkpoint", key or f"key{iteration}")
    manifest = read_manifest(stage.final)
    if manifest is None:
        rows.write_jsonl(stage.start() / "training_log.jsonl", steps_of(iteration))
        manifest = stage.commit(num_in=1, num_rows=1, num_steps=STEPS[iteration])
    return manifest


class Loop:
    """The driver's calls in a run of two iterations, without engines; every call of `go` is a driver of its own."""

    def __init__(self, recipe, root):
        self.recipe, self.run, self.said = recipe, Run(root), []
        self.run.root.mkdir(exist_ok=True)

    def go(self, *overrides, until=99, live=False):
        """The first `until` calls; `live` also tells of the steps before they are committed."""
        config = load(self.recipe("[activation]\npath = 't.jsonl'\n"), ["seed=3", *overrides])
        self.run.event("driver_start", pid=1)
        tracked = Trackers(config, self.run, self.said.append)
        tracked.start()
        calls = [lambda: tracked.log_evaluation(model("base", 0, 0.25))]
        for iteration, name in ((0, "activation"), (1, "iteration 1"), (2, "iteration 2")):
            if live:
                calls.append(lambda n=iteration: tracked.log_steps(f"key{n}", n, "checkpoint", steps_of(n)[:-1]))
            calls.append(lambda n=iteration: tracked.log_training(commit_training(self.run, n), n))
            calls.append(lambda n=iteration, name=name: tracked.log_evaluation(model(name, n, 0.5 + n / 8)))
        for call in calls[:until]:
            call()
        if until == 99:
            tracked.close(failed=False)
        return tracked


@pytest.fixture
def loop(recipe, tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return Loop(recipe, tmp_path / "run")


LOSS = [(1, 1.0), (2, 0.5), (3, 1 / 3)], [(4, 2.0), (5, 1.5), (6, 1 + 1 / 3), (7, 1.25), (8, 3.0), (9, 2.5)]
FIRST = [(0, 0.25), (3, 0.5), (7, 0.625), (9, 0.75)]  # reward of y1 of every model, at the updates it has had


def tensorboard(root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(root / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(found, tag):
    return [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]


def check_tensorboard(root):
    found = tensorboard(root)
    assert (scalars(found, "activation/loss"), scalars(found, "training/loss")) == LOSS
    assert scalars(found, "evaluation/held/y1/reward") == FIRST
    assert scalars(found, "evaluation/held/gain/reward/low")[0] == (0, pytest.approx(0.025))
    assert scalars(found, "drift/cut_rate") == [(7, 0.25), (9, 0.25)]
    assert scalars(found, "decision/continue") == [(7, 1.0), (9, 1.0)]
    assert [event.step for event in found.Scalars("ledger/num_updates")] == [3, 7, 9]
    assert "drift/tokens_ratio" not in found.Tags()["scalars"]
    text = found.Tensors("decision/text_summary")
    assert text[0].tensor_proto.string_val[0].decode().endswith("it still improves")
    assert b"seed = 3" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert len(list((root / "tensorboard").iterdir())) == 1


def test_tensorboard_has_every_point_once_wherever_a_run_was_killed(loop, tmp_path):
    for until in (1, 3, 4, 6, 99, 99):
        loop.go(until=until, live=True)
    check_tensorboard(loop.run.root)
    assert not loop.said


def test_a_second_call_writes_nothing(loop):
    loop.go()
    before = {path: path.stat().st_mtime_ns for path in loop.run.root.rglob("*") if path.name != "events.jsonl"}
    assert loop.go().open == {}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    check_tensorboard(loop.run.root)


def test_a_driver_killed_after_a_write_that_it_did_not_count_doubles_nothing(loop):
    loop.go(until=4)
    counted = (loop.run.root / "trackers.json").read_bytes()
    loop.go(until=6)
    (loop.run.root / "trackers.json").write_bytes(counted)
    loop.go()
    check_tensorboard(loop.run.root)


def test_steps_of_an_earlier_driver_are_told_before_those_to_come(loop, recipe):
    loop.run.event("training", key="key1", iteration=1, steps=steps_of(1)[:2])
    loop.run.event("training", key="other", iteration=1, steps=steps_of(1))
    tracked = loop.go(until=0)
    tracked.replay_steps("key1", 1, "checkpoint")
    tracked.log_steps("key1", 1, "checkpoint", steps_of(1, first=1, tag=9.0))  # a step again, and what follows
    assert [row.step for row in tracked.rows] == [1, 2, 3, 4]
    assert [row.values["training/loss"] for row in tracked.rows][:2] == [2.0, 1.5]
    tracked.log_steps("key2", 2, "checkpoint", steps_of(2, first=1))  # a gap waits for the committed log
    assert len(tracked.rows) == 4


def test_a_reward_model_that_is_trained_again_has_its_own_axis(loop):
    tracked = loop.go(until=0)
    tracked.log_steps("r", 1, "reward_model", [{"step": 0, "loss": 0.5}])
    tracked.log_steps("k", 1, "checkpoint", [{"step": 0, "loss": 0.25}])
    assert [(row.axis, row.step) for row in tracked.rows] == [("reward_model/updates", 1), ("updates", 1)]
    assert tracked.rows[0].values == {"reward_model/loss": 0.5, "reward_model/iteration": 1.0}


def test_off_means_no_file(loop):
    assert loop.go("trackers.use=[]").rows == []
    assert {path.name for path in loop.run.root.iterdir()} <= {"events.jsonl", "iteration-00", "iteration-01", "iteration-02"}


def test_values_that_are_not_finite_are_written_as_they_are(loop):
    tracked = loop.go(until=0)
    tracked.add([Row("k", 1, {"a": math.nan, "b": math.inf}, {"t\x00": "\ud800 </script>"[1:]})])
    tracked.close(failed=False)
    found = tensorboard(loop.run.root)
    assert math.isnan(found.Scalars("a")[0].value)
    assert found.Scalars("b")[0].value == math.inf
    assert not loop.said


def mlflow_points(root, key):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(root / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'evolve-ray'")
    runs = client.search_runs([experiment.experiment_id])
    return runs, [[(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)] for run in runs]


def test_mlflow_has_one_run_with_every_point_once(loop):
    use = 'trackers.use=["mlflow"]'
    loop.go(use, until=4)
    counted = (loop.run.root / "trackers.json").read_bytes()
    loop.go(use, until=6)
    (loop.run.root / "trackers.json").write_bytes(counted)  # as if killed between the write and its count
    loop.go(use)
    tracked = loop.go(use, until=7)
    tracked.add([Row("more", 10, {"odd": math.nan, "odder": -math.inf})])
    tracked.close(failed=False)
    (run,), (found,) = mlflow_points(loop.run.root, "training/loss")
    assert sorted(found) == [(step, pytest.approx(value)) for step, value in LOSS[1]]
    assert (run.info.status, run.info.run_name, run.data.params["seed"]) == ("FINISHED", "small", "3")
    assert run.data.tags["decision.step_9"].endswith("it still improves")
    assert loop.said == []


def test_rows_that_differ_from_the_counted_ones_are_another_run(loop):
    use = 'trackers.use=["mlflow"]'
    loop.go(use, until=5)
    (loop.run.iteration(1) / "checkpoint").rename(loop.run.root / "aside")
    commit_training(loop.run, 1, key="changed")
    loop.go(use)
    runs, found = mlflow_points(loop.run.root, "training/loss")
    assert len(runs) == 2
    assert sorted(map(len, found)) == [4, 6]
    assert json.loads((loop.run.root / "trackers.json").read_bytes())["mlflow"]["attempt"] == 1


def wandb_records(folder):
    """History rows of an offline run: LevelDB's log format, blocks of 32 KiB with records of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                found.append(items)
    return found


@pytest.mark.long  # the client's own service loses the last records of a part now and then where both cores are busy
def test_wandb_is_offline_and_a_resumed_run_adds_a_part_with_the_rest(loop):
    use = 'trackers.use=["wandb"]'
    tracked = loop.go(use, until=4)
    tracked.add([Row("odd", 7, {"odd": math.nan, "odder": math.inf})])
    tracked.close(failed=True)
    counted = json.loads((loop.run.root / "trackers.json").read_bytes())["wandb"]["rows"]
    assert sum(count for _, count in counted) == 10
    (loop.run.root / "trackers.json").write_text(json.dumps({"wandb": {"attempt": 0, "where": "", "rows": counted[:-1]}}))
    time.sleep(1.1)  # the client names a part by the second; two drivers are further apart than that
    loop.go(use)
    parts = sorted((loop.run.root / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1, "one run id"
    first, second = map(wandb_records, parts)
    assert math.isnan(first[-1]["odd"])
    found = [(row["updates"], row["training/loss"]) for row in first + second if "training/loss" in row]
    assert found == [(step, pytest.approx(value)) for step, value in LOSS[1]]
    assert [row["_step"] for row in first[:-1] + second] == list(range(13))
    assert second[-1]["decision"].endswith("it still improves")
    assert loop.said == []


class Broken:
    """A client whose network is away."""

    def __init__(self, opened):
        raise ConnectionError("no route\nto host")


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(loop, monkeypatch):
    monkeypatch.setitem(tracker_clients.TRACKERS, "mlflow", Broken)
    loop.go('trackers.use=["mlflow", "tensorboard"]')
    (line,) = loop.said
    assert line.startswith("warning: tracker mlflow: ConnectionError: no route; the run continues without it")
    events = [event for event in rows.read_jsonl(loop.run.root / "events.jsonl") if event["event"] == "tracker_failed"]
    assert [(event["tracker"], event["error"]) for event in events] == [("mlflow", "ConnectionError: no route")]
    check_tensorboard(loop.run.root)


def test_what_a_failed_tracker_missed_is_written_by_the_next_driver(loop, monkeypatch):
    monkeypatch.setattr(tracker_clients.TensorBoard, "write", lambda *_: 1 / 0)
    loop.go()
    monkeypatch.undo()
    loop.go()
    check_tensorboard(loop.run.root)


def test_damaged_count_is_told_and_ends_no_run(loop):
    (loop.run.root / "trackers.json").write_text("{")
    assert loop.go().rows == []
    assert "trackers.json: is damaged; delete it" in loop.said[0]


@pytest.mark.parametrize("origin", [None, "namespace"])
def test_missing_package_is_refused_before_anything_starts(loop, monkeypatch, origin):
    spec = None if origin is None else type("Spec", (), {"origin": None})
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"trackers\.use: 'tensorboard' needs the package tensorboardX.*-e '\.\[track\]'"):
        loop.go()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('trackers.use=["tensorbord"]', "holds 'tensorbord' .*did you mean 'tensorboard'"),
        ("trackers.use=[3]", "holds 3 .*the trackers are tensorboard, mlflow, wandb"),
        ('trackers.use=["wandb", "wandb"]', "names 'wandb' twice"),
        ("trackers.use=wandb", "must be a list"),
        ("trackers.projekt=x", "did you mean 'project'"),
        ("trackers.project=' '", "is empty"),
    ],
)
def test_faulty_options_are_named(recipe, given, message):
    with pytest.raises(UserError, match=message):
        load(recipe(), [given])


def test_trackers_are_no_part_of_what_a_run_computes(recipe):
    plain = load(recipe())
    other = load(recipe(), ["trackers.use=[]", "trackers.project=x"])
    assert resolved(plain, runtime=False) == resolved(other, runtime=False)
    assert "trackers" not in resolved(plain, runtime=False)
