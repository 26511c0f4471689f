"""Sends the figures of a run to TensorBoard, MLflow and Weights & Biases, each through its own client.

The stages of a run fix the order of its rows, so the same command gives the same rows again. RUN/trackers.json counts the rows
that are written, and these are not written again. A row is counted after the client has written it. A kill between the two does
not double a point: every driver that writes replaces TensorBoard's file, MLflow is asked for the steps that it has, and a row of
Weights & Biases has its index as its step. If the rows differ from the counted ones (--rerun-changed), MLflow and Weights &
Biases get a new run with all rows.

`step` is the number of optimiser updates of the policy so far, over all phases and iterations. A tracker that fails is reported
once, in a printed line and an event, and the run continues; the next submission writes the missing rows.
"""

import importlib.util
import itertools
import json
import os
from typing import Any

from evolve_ray.config.options import Config
from evolve_ray.config.resolve import flatten, resolved
from evolve_ray.errors import UserError, first_line
from evolve_ray.report.ledger import TOTALS, ledger
from evolve_ray.store.files import write_atomic
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.rows import digest, read_jsonl
from evolve_ray.store.run import Run
from evolve_ray.watch.tracker_clients import PACKAGES, REWARD_UPDATES, TRACKERS, UPDATES, Row, Tracker, TrackerSettings


def axis_of(name: str) -> str:
    """The axis of the updates of a training, by the name of its checkpoint."""
    if name == "reward_model":
        return REWARD_UPDATES
    return UPDATES if name in ("checkpoint", "activation") else f"{name.removesuffix('_checkpoint')}/updates"


class Trackers:
    """The trackers of a run; without a configuration it has none."""

    def __init__(self, config: Config | None = None, run: Run | None = None, say: Any = print):
        self.config, self.run, self.say = config, run, say
        self.names: list[str] = list(config.trackers.use) if config else []
        self.rows: list[Row] = []
        self.updates = {UPDATES: 0, REWARD_UPDATES: 0}
        self.next_steps: dict[str, int] = {}  # the first step of each training that is not a row yet, by stage key
        self.open: dict[str, Tracker] = {}
        self.written: dict[str, dict[str, Any]] = {}  # the content of RUN/trackers.json
        for name in self.names:
            spec = importlib.util.find_spec(PACKAGES[name])
            if spec is None or spec.origin is None:  # a spec without origin is only a folder, such as wandb/
                raise UserError(
                    f"trackers.use: {name!r} needs the package {PACKAGES[name]}, which is not installed; "
                    "run pip install -e '.[track]', or remove it from trackers.use"
                )

    def start(self) -> None:
        """Reads which rows earlier drivers have written; the caller holds the lock of the run."""
        assert self.run is not None
        try:
            self.written = json.loads((self.run.root / "trackers.json").read_bytes())
            for state in self.written.values():
                state["keys"] = [key for key, count in state["rows"] for _ in range(count)]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            self.drop(list(self.names), "trackers.json: is damaged; delete it, and the trackers' folders beside it")

    def log_steps(self, key: str, iteration: int, name: str, entries: list[dict[str, Any]]) -> None:
        """Adds steps of the training `name` with the stage key `key`; skips steps that are already rows, or that leave a gap."""
        axis, prefix = axis_of(name), "training" if name == "checkpoint" else name.removesuffix("_checkpoint")
        if iteration == 0 and self.config:
            prefix = "offline" if self.config.offline and name == "checkpoint" else "activation"
        rows = []
        for entry in entries:
            if self.names and entry["step"] == self.next_steps.get(key, 0):
                self.next_steps[key] = entry["step"] + 1
                values = {f"{prefix}/{metric}": value for metric, value in entry.items() if metric != "step"}
                step = self.updates.get(axis, 0) + entry["step"] + 1
                rows.append(Row(key, step, numbers({**values, f"{prefix}/iteration": iteration}), axis=axis))
        self.add(rows)

    def replay_steps(self, key: str, iteration: int, name: str) -> None:
        """Adds the steps of a training that earlier drivers recorded as events, before the training continues."""
        if self.names and self.run:
            for event in read_jsonl(self.run.root / "events.jsonl"):
                if event["event"] == "training" and event.get("key") == key:
                    self.log_steps(key, iteration, name, event["steps"])

    def log_training(self, manifest: Manifest, iteration: int) -> None:
        """Adds the remaining steps of a committed training."""
        if self.names:
            name = manifest.folder.name
            self.log_steps(manifest.key, iteration, name, read_jsonl(manifest.path("training_log.jsonl")))
            self.updates[axis_of(name)] = self.updates.get(axis_of(name), 0) + manifest.stats["num_steps"]

    def log_evaluation(self, model: dict[str, Any]) -> None:
        """Adds all figures of a model in the report, and the cost of the run up to this model."""
        if self.names and self.run and self.config:
            lines = ledger(self.run, self.config.engine.actors)["iterations"]
            values = model_values(model)
            if model["name"] != "base":  # iteration 0 may continue after the evaluation of the base model
                values |= ledger_values(lines, model["iteration"])
            texts = {"decision": "{action}: {reason}".format(**model["decision"])} if model.get("decision") else {}
            key = digest([model["name"], model["model"], model["splits"]])
            self.add([Row(key, self.updates[UPDATES], values, texts)])

    def add(self, rows: list[Row]) -> None:
        """Adds rows, and writes to every tracker the rows that it does not have yet."""
        first, self.rows = len(self.rows), self.rows + rows
        for name in self.names if rows else ():
            state = self.written.setdefault(name, {"attempt": 0, "keys": [], "where": destination_of(name)})
            keys = [row.key for row in self.rows[first:]]
            rows_differ = any(old != new for old, new in zip(state["keys"][first:], keys, strict=False))
            if rows_differ or state["where"] != destination_of(name):
                attempt = state["attempt"] + rows_differ
                state = self.written[name] = {"attempt": attempt, "keys": [], "where": destination_of(name)}
                if name in self.open:
                    self.guard(name, lambda name=name: self.open.pop(name).close(failed=False))
            if name in self.names and len(state["keys"]) < len(self.rows):
                self.guard(name, lambda name=name, state=state: self.write(name, state))

    def write(self, name: str, state: dict[str, Any]) -> None:
        """Writes the missing rows to a tracker, which it opens if necessary, and counts them in RUN/trackers.json."""
        assert self.run is not None
        assert self.config is not None
        if name not in self.open:
            with open(self.run.root / "events.jsonl", "rb") as file:
                first_event = file.readline().decode("utf-8", "replace")  # its time and process make it unique to this run
            config = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in flatten(resolved(self.config)).items()}
            identity = digest([first_event, state["attempt"]])[:16]
            settings = TrackerSettings(self.run.root, self.config.name, self.config.trackers.project, identity, config)
            self.open[name] = TRACKERS[name](settings)
        self.open[name].write(self.rows, len(state["keys"]))
        state["keys"] = [row.key for row in self.rows]
        content = {
            name: {**state, "rows": [[key, len(list(group))] for key, group in itertools.groupby(state["keys"])]}
            for name, state in self.written.items()
        }
        for part in content.values():
            del part["keys"]
        write_atomic(self.run.root / "trackers.json", json.dumps(content, indent=1).encode())

    def guard(self, name: str, call: Any) -> None:
        """Calls a client; if it fails, drops the tracker and lets the run continue."""
        try:
            call()
        except Exception as error:  # a client may raise any error of its network or disk
            self.drop([name], f"{type(error).__name__}: {first_line(error)}")

    def drop(self, names: list[str], reason: str) -> None:
        """Stops using trackers, with a warning and an event for each."""
        assert self.run is not None
        for name in names:
            self.names = [remaining for remaining in self.names if remaining != name]
            self.open.pop(name, None)
            self.run.event("tracker_failed", tracker=name, error=reason[:2000])
            self.say(
                f"warning: tracker {name}: {reason}; the run continues without it; the next submission writes the missing rows"
            )

    def close(self, *, failed: bool) -> None:
        """Closes all trackers at the end of the run; `failed` if it ended with an error."""
        for name, tracker in list(self.open.items()):
            self.guard(name, lambda tracker=tracker: tracker.close(failed=failed))
        self.open = {}


def destination_of(name: str) -> str:
    """Returns a digest of the address that a tracker writes to, or ""; the address itself may hold a password.

    A tracker with another address than before gets all rows again.
    """
    return digest(os.environ.get("MLFLOW_TRACKING_URI", "")) if name == "mlflow" else ""


def numbers(tree: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers among the leaves of a tree, by their paths; nan and infinities are kept."""
    values: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            values |= {f"{name}/{path}": number for path, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            values[name] = float(value)
    return values


def model_values(model: dict[str, Any]) -> dict[str, float]:
    """Returns the figures of a model in the report by metric name.

    The names are `evaluation/SPLIT/yK/...`, `evaluation/SPLIT/gain/...` with its interval, `probe/...`, `drift/...` and
    `decision/continue`.
    """
    tree: dict[str, Any] = {"iteration": model["iteration"]}
    for split, figures in model["splits"].items():
        rounds = {f"y{number}": {name: mean_of(value) for name, value in part.items() if name not in ("gain", "against_previous")}
                 for number, part in figures["rounds"].items()}  # fmt: skip
        tree[f"evaluation/{split}"] = {**rounds, "gain": figures.get("gain", {}), "best_of": mean_of(figures.get("best_of", {}))}
    for part in ("probe", "drift"):
        tree[part] = model.get(part) or {}
    if model.get("decision"):
        tree["decision/continue"] = int(model["decision"]["action"] == "continue")
    return numbers(tree)


def mean_of(value: Any) -> Any:
    """Returns a tree in which every interval is replaced by its mean."""
    if isinstance(value, dict):
        return value["mean"] if value.keys() >= {"mean", "low", "high"} else {name: mean_of(part) for name, part in value.items()}
    return value


def ledger_values(lines: list[dict[str, Any]], iteration: int) -> dict[str, float]:
    """Returns the totals of the run up to and including an iteration, as `ledger/...`."""
    past = [line for line in lines if line["iteration"] <= iteration]
    return numbers({f"ledger/{name}": sum(line[name] for line in past) for name in TOTALS})
