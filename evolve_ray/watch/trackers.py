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
from typing import Any

from evolve_ray.config.options import Config
from evolve_ray.config.resolve import flatten, resolved
from evolve_ray.errors import UserError, first_line
from evolve_ray.report.ledger import TOTALS, ledger
from evolve_ray.store.files import write_atomic
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.rows import digest, read_jsonl
from evolve_ray.store.run import Run
from evolve_ray.watch.tracker_clients import PACKAGES, REWARD_UPDATES, TRACKERS, UPDATES, Opened, Row, Tracker


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

    def log_steps(self, key: str, iteration: int, name: str, entries: list[dict[str, Any]]) -> None:
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

    def replay_steps(self, key: str, iteration: int, name: str) -> None:
        """Steps that an earlier driver was told of, before those that will be told now."""
        if self.names and self.run:
            for event in read_jsonl(self.run.root / "events.jsonl"):
                if event["event"] == "training" and event.get("key") == key:
                    self.log_steps(key, iteration, name, event["steps"])

    def log_training(self, manifest: Manifest, iteration: int) -> None:
        """All steps of a committed training."""
        if self.names:
            name = manifest.folder.name
            self.log_steps(manifest.key, iteration, name, read_jsonl(manifest.path("training_log.jsonl")))
            self.updates[REWARD_UPDATES if name == "reward_model" else UPDATES] += manifest.stats["num_steps"]

    def log_evaluation(self, model: dict[str, Any]) -> None:
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
