"""TensorBoard, MLflow and Weights & Biases, each behind the same two verbs."""

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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


def plain(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]
