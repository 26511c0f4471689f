"""The figures of a run in TensorBoard, MLflow and Weights & Biases too, each through its own client.

A run hands over rows in an order that its stages fix, so the same command again hands over the same rows, and those that
RUN/trackers.json counts as written are not written again. Rows are counted after a client has taken them. What a kill between
the two leaves is no second point: TensorBoard's file is written anew by every driver that has something to write, MLflow is
asked for the steps that it holds, and a row of Weights & Biases has its place in the order as its step. Where the rows
differ from the counted ones (--rerun-changed), MLflow and Weights & Biases get a new run with all of them.

`step` is the number of optimiser updates that the policy has had, over all phases and iterations. A tracker that fails is
told once, in a printed line and an event, and the run goes on; the next submission writes what is missing.
"""

import importlib.util
import itertools
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from evolve_ray.config.options import Config
from evolve_ray.config.resolve import flatten, resolved
from evolve_ray.errors import UserError, first_line
from evolve_ray.ledger import TOTALS, ledger
from evolve_ray.store.files import write_atomic
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.rows import digest, read_jsonl
from evolve_ray.store.run import Run

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
UPDATES, REWARD_UPDATES = "updates", "reward_model/updates"  # axes: of the policy, and of a reward model that is trained again


@dataclass(frozen=True)
class Row:
    """Figures and texts at one step; `key` names what they are of, and is the same when the same command comes again."""

    key: str
    step: int
    values: dict[str, float]
    texts: dict[str, str] = field(default_factory=dict)
    axis: str = UPDATES


class Tracker(Protocol):
    """One client on one run of it."""

    def write(self, rows: list[Row], first: int) -> None:
        """`rows[first:]`, all taken when this returns; `rows` are all of the run so far."""

    def close(self, *, failed: bool) -> None: ...


@dataclass(frozen=True)
class Opened:
    """What a client is opened with; `identity` is that of the run, or of its rows after --rerun-changed."""

    root: Path
    name: str
    project: str
    identity: str
    config: dict[str, Any]  # by dotted names


class TensorBoard:
    """One event file in RUN/tensorboard, which takes the place of those before."""

    def __init__(self, opened: Opened):
        self.folder, self.config = opened.root / "tensorboard", opened.config
        self.file: Any = None

    def write(self, rows: list[Row], first: int) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        before: list[Path] = []
        if self.file is None:
            self.folder.mkdir(exist_ok=True)
            before, first = list(self.folder.glob("events.out.tfevents.*")), 0
            # Unlike SummaryWriter, it writes in this thread: what was flushed is in the file.
            self.file = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
            # A TensorBoard that looks on drops what it has read from the files before.
            self.file.write_event(Event(wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
            text = "\n".join(f"    {name} = {value}" for name, value in self.config.items())
            self.file.write_event(Event(wall_time=time.time(), summary=summary.text("config", text)))
        for row in rows[first:]:
            for name, value in row.values.items():
                self.file.write_event(Event(wall_time=time.time(), step=row.step, summary=summary.scalar(name, value)))
            for name, text in row.texts.items():
                self.file.write_event(Event(wall_time=time.time(), step=row.step, summary=summary.text(name, text)))
        self.file.flush()
        for path in before:
            path.unlink()

    def close(self, *, failed: bool) -> None:
        self.file.close()


class MLflow:
    """A run with the tag `evolve_ray.run`, in RUN/mlflow unless MLFLOW_TRACKING_URI names another place."""

    def __init__(self, opened: Opened):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database package
        for name, value in (("MAX_RETRIES", "2"), ("TIMEOUT", "20")):  # a server that is away must not hold up the run
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or (opened.root / "mlflow").as_uri())
        known = self.client.get_experiment_by_name(opened.project)
        experiment = known.experiment_id if known else self.client.create_experiment(opened.project)
        found = self.client.search_runs([experiment], f"tags.`evolve_ray.run` = '{opened.identity}'", max_results=1)
        self.resumed, self.created = bool(found), not found
        self.held: dict[str, set[int]] = {}  # steps by metric that were there when this driver began
        tags = {"evolve_ray.run": opened.identity}
        run = found[0] if found else self.client.create_run(experiment, run_name=opened.name, tags=tags)
        self.run_id = run.info.run_id
        self.client.update_run(self.run_id, status="RUNNING")
        if not run.data.params:
            params = [Param(plain(name), str(value)[:6000]) for name, value in opened.config.items()]
            for start in range(0, len(params), 100):  # the most that one call may hold
                self.client.log_batch(self.run_id, params=params[start : start + 100])

    def write(self, rows: list[Row], first: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        first, self.created = (0 if self.created else first), False
        for row in rows[first:] if self.resumed else ():
            for name in row.values.keys() - self.held.keys():
                self.held[name] = {metric.step for metric in self.client.get_metric_history(self.run_id, name)}
        metrics = [
            Metric(name, value, now, row.step)
            for row in rows[first:]
            for name, value in row.values.items()
            if row.step not in self.held.get(name, ())
        ]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        for row in rows[first:]:
            for name, text in row.texts.items():
                self.client.set_tag(self.run_id, f"{plain(name)}.step_{row.step}", text[:5000])

    def close(self, *, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class Wandb:
    """A run with a fixed id, offline in RUN/wandb unless WANDB_MODE says otherwise; each driver that writes adds a part to it."""

    def __init__(self, opened: Opened):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_service_wait=120
        )
        self.run = wandb.init(
            project=opened.project, name=opened.name, id=opened.identity, resume="allow", dir=str(opened.root),
            mode=mode, config=opened.config, settings=quiet,
        )  # fmt: skip
        self.run.define_metric("*", step_metric=UPDATES)
        self.run.define_metric("reward_model/*", step_metric=REWARD_UPDATES)

    def write(self, rows: list[Row], first: int) -> None:
        for place, row in enumerate(rows[first:], start=first):
            self.run.log({**row.values, **row.texts, row.axis: row.step}, step=place, commit=True)

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": Wandb}


class Trackers:
    """The trackers of a run; without a configuration there is none."""

    def __init__(self, config: Config | None = None, run: Run | None = None, say: Any = print):
        self.config, self.run, self.say = config, run, say
        self.names: list[str] = list(config.trackers.use) if config else []
        self.rows: list[Row] = []
        self.updates = {UPDATES: 0, REWARD_UPDATES: 0}
        self.told: dict[str, int] = {}  # steps of each training that are rows already
        self.open: dict[str, Tracker] = {}
        self.written: dict[str, dict[str, Any]] = {}  # RUN/trackers.json
        for name in self.names:
            found = importlib.util.find_spec(PACKAGES[name])
            if found is None or found.origin is None:  # a folder named wandb is no package
                raise UserError(
                    f"trackers.use: {name!r} needs the package {PACKAGES[name]}, which is not installed; "
                    "pip install -e '.[track]', or leave it out"
                )

    def start(self) -> None:
        """Reads what earlier drivers have written; under the run's lock."""
        assert self.run is not None
        try:
            self.written = json.loads((self.run.root / "trackers.json").read_bytes())
            for state in self.written.values():
                state["keys"] = [key for key, count in state["rows"] for _ in range(count)]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            self.stop(list(self.names), "trackers.json: is damaged; delete it, and the trackers' folders beside it")

    def training(self, key: str, iteration: int, name: str, entries: list[dict[str, Any]]) -> None:
        """Steps of the training `name` with the stage key `key`; those that came before, or leave a gap, are passed over."""
        prefix = name if name == "reward_model" else "training"
        if iteration == 0 and self.config:
            prefix = "offline" if self.config.offline and name == "checkpoint" else "activation"
        axis = REWARD_UPDATES if name == "reward_model" else UPDATES
        found = []
        for entry in entries:
            if self.names and entry["step"] == self.told.get(key, 0):
                self.told[key] = entry["step"] + 1
                values = {f"{prefix}/{metric}": value for metric, value in entry.items() if metric != "step"}
                step = self.updates[axis] + entry["step"] + 1
                found.append(Row(key, step, numbers({**values, f"{prefix}/iteration": iteration}), axis=axis))
        self.add(found)

    def begins(self, key: str, iteration: int, name: str) -> None:
        """Steps that an earlier driver was told of, before those that will be told now."""
        if self.names and self.run:
            for event in read_jsonl(self.run.root / "events.jsonl"):
                if event["event"] == "training" and event.get("key") == key:
                    self.training(key, iteration, name, event["steps"])

    def trained(self, manifest: Manifest, iteration: int) -> None:
        """All steps of a committed training."""
        if self.names:
            name = manifest.folder.name
            self.training(manifest.key, iteration, name, read_jsonl(manifest.path("training_log.jsonl")))
            self.updates[REWARD_UPDATES if name == "reward_model" else UPDATES] += manifest.stats["num_steps"]

    def evaluated(self, model: dict[str, Any]) -> None:
        """Everything that a model's part of the report says, and what the run has cost by then."""
        if self.names and self.run and self.config:
            lines = ledger(self.run, self.config.engine.actors)["iterations"]
            values = model_values(model)
            if model["name"] != "base":  # with which iteration 0 may not have ended
                values |= ledger_values(lines, model["iteration"])
            texts = {"decision": "{action}: {reason}".format(**model["decision"])} if model.get("decision") else {}
            key = digest([model["name"], model["model"], model["splits"]])
            self.add([Row(key, self.updates[UPDATES], values, texts)])

    def add(self, rows: list[Row]) -> None:
        """Takes the next rows, and hands to every tracker what it has not written yet."""
        first, self.rows = len(self.rows), self.rows + rows
        for name in self.names if rows else ():
            state = self.written.setdefault(name, {"attempt": 0, "keys": [], "where": place_of(name)})
            keys = [row.key for row in self.rows[first:]]
            other_history = any(old != new for old, new in zip(state["keys"][first:], keys, strict=False))
            if other_history or state["where"] != place_of(name):
                attempt = state["attempt"] + other_history
                state = self.written[name] = {"attempt": attempt, "keys": [], "where": place_of(name)}
                if name in self.open:
                    self.attempt(name, lambda name=name: self.open.pop(name).close(failed=False))
            if name in self.names and len(state["keys"]) < len(self.rows):
                self.attempt(name, lambda name=name, state=state: self.write(name, state))

    def write(self, name: str, state: dict[str, Any]) -> None:
        assert self.run is not None
        assert self.config is not None
        if name not in self.open:
            with open(self.run.root / "events.jsonl", "rb") as file:
                born = file.readline().decode("utf-8", "replace")  # no other run has begun at that time in that process
            config = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in flatten(resolved(self.config)).items()}
            identity = digest([born, state["attempt"]])[:16]
            opened = Opened(self.run.root, self.config.name, self.config.trackers.project, identity, config)
            self.open[name] = TRACKERS[name](opened)
        self.open[name].write(self.rows, len(state["keys"]))
        state["keys"] = [row.key for row in self.rows]
        kept = {
            name: {**state, "rows": [[key, len(list(same))] for key, same in itertools.groupby(state["keys"])]}
            for name, state in self.written.items()
        }
        for part in kept.values():
            del part["keys"]
        write_atomic(self.run.root / "trackers.json", json.dumps(kept, indent=1).encode())

    def attempt(self, name: str, call: Any) -> None:
        """A tracker's own failure ends the tracker, not the run."""
        try:
            call()
        except Exception as error:  # clients raise whatever their networks and disks do
            self.stop([name], f"{type(error).__name__}: {first_line(error)}")

    def stop(self, names: list[str], reason: str) -> None:
        assert self.run is not None
        for name in names:
            self.names = [other for other in self.names if other != name]
            self.open.pop(name, None)
            self.run.event("tracker_failed", tracker=name, error=reason[:2000])
            self.say(f"warning: tracker {name}: {reason}; the run goes on without it, the next submission writes what is missing")

    def close(self, *, failed: bool) -> None:
        for name, tracker in list(self.open.items()):
            self.attempt(name, lambda tracker=tracker: tracker.close(failed=failed))
        self.open = {}


def place_of(name: str) -> str:
    """Where a tracker writes, as a digest: an address may hold a password. What was written elsewhere is not written here."""
    return digest(os.environ.get("MLFLOW_TRACKING_URI", "")) if name == "mlflow" else ""


def plain(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]


def numbers(tree: dict[str, Any]) -> dict[str, float]:
    """The numbers among the leaves of a tree, by their paths; `nan` and infinities stay what they are."""
    found: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= {f"{name}/{path}": number for path, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def model_values(model: dict[str, Any]) -> dict[str, float]:
    """`evaluation/SPLIT/yK/...`, `evaluation/SPLIT/gain/...` with its interval, `probe/...`, `drift/...`, `decision/continue`."""
    tree: dict[str, Any] = {"iteration": model["iteration"]}
    for split, figures in model["splits"].items():
        found = {f"y{number}": {name: mean_of(value) for name, value in part.items() if name not in ("gain", "against_previous")}
                 for number, part in figures["rounds"].items()}  # fmt: skip
        tree[f"evaluation/{split}"] = {**found, "gain": figures.get("gain", {}), "best_of": mean_of(figures.get("best_of", {}))}
    for part in ("probe", "drift"):
        tree[part] = model.get(part) or {}
    if model.get("decision"):
        tree["decision/continue"] = int(model["decision"]["action"] == "continue")
    return numbers(tree)


def mean_of(value: Any) -> Any:
    """An interval as its mean, also inside of a tree."""
    if isinstance(value, dict):
        return value["mean"] if value.keys() >= {"mean", "low", "high"} else {name: mean_of(part) for name, part in value.items()}
    return value


def ledger_values(lines: list[dict[str, Any]], iteration: int) -> dict[str, float]:
    """`ledger/...`: the totals of the run up to and with this iteration."""
    upto = [line for line in lines if line["iteration"] <= iteration]
    return numbers({f"ledger/{name}": sum(line[name] for line in upto) for name in TOTALS})
