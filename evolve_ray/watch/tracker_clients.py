"""The clients of TensorBoard, MLflow and Weights & Biases, each with the same two methods."""

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
UPDATES, REWARD_UPDATES = "updates", "reward_model/updates"  # axes: updates of the policy, and of a refreshed reward model


@dataclass(frozen=True)
class Row:
    """Figures and texts at one step. `key` identifies their source; the same command gives the same keys again."""

    key: str
    step: int
    values: dict[str, float]
    texts: dict[str, str] = field(default_factory=dict)
    axis: str = UPDATES


class Tracker(Protocol):
    """A client that writes to one run of its tracker."""

    def write(self, rows: list[Row], first: int) -> None:
        """Writes `rows[first:]`, all before it returns; `rows` are all rows of the run so far."""

    def close(self, *, failed: bool) -> None:
        """Ends the client; `failed` if the run ended with an error."""


@dataclass(frozen=True)
class TrackerSettings:
    """The settings of a client. `identity` identifies the run; it changes if --rerun-changed replaces rows of the run."""

    root: Path
    name: str
    project: str
    identity: str
    config: dict[str, Any]  # the options by dotted names


class TensorBoard:
    """One event file in RUN/tensorboard, which replaces the files of earlier drivers."""

    def __init__(self, settings: TrackerSettings):
        self.folder, self.config = settings.root / "tensorboard", settings.config
        self.file: Any = None

    def write(self, rows: list[Row], first: int) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        old_files: list[Path] = []
        if self.file is None:
            self.folder.mkdir(exist_ok=True)
            old_files, first = list(self.folder.glob("events.out.tfevents.*")), 0
            # Unlike SummaryWriter, EventsWriter writes in this thread, so flushed events are in the file.
            self.file = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
            # This event makes a running TensorBoard drop the points that it has read from the old files.
            self.file.write_event(Event(wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
            text = "\n".join(f"    {name} = {value}" for name, value in self.config.items())
            self.file.write_event(Event(wall_time=time.time(), summary=summary.text("config", text)))
        for row in rows[first:]:
            for name, value in row.values.items():
                self.file.write_event(Event(wall_time=time.time(), step=row.step, summary=summary.scalar(name, value)))
            for name, text in row.texts.items():
                self.file.write_event(Event(wall_time=time.time(), step=row.step, summary=summary.text(name, text)))
        self.file.flush()
        for path in old_files:
            path.unlink()

    def close(self, *, failed: bool) -> None:
        self.file.close()


class MLflow:
    """An MLflow run with the tag `evolve_ray.run`, in RUN/mlflow unless MLFLOW_TRACKING_URI is set."""

    def __init__(self, settings: TrackerSettings):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database package
        for name, value in (("MAX_RETRIES", "2"), ("TIMEOUT", "20")):  # a server that is down must not delay the run
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or (settings.root / "mlflow").as_uri())
        existing = self.client.get_experiment_by_name(settings.project)
        experiment = existing.experiment_id if existing else self.client.create_experiment(settings.project)
        runs = self.client.search_runs([experiment], f"tags.`evolve_ray.run` = '{settings.identity}'", max_results=1)
        self.resumed, self.created = bool(runs), not runs
        self.old_steps: dict[str, set[int]] = {}  # steps that earlier drivers wrote, by metric
        tags = {"evolve_ray.run": settings.identity}
        run = runs[0] if runs else self.client.create_run(experiment, run_name=settings.name, tags=tags)
        self.run_id = run.info.run_id
        self.client.update_run(self.run_id, status="RUNNING")
        if not run.data.params:
            params = [Param(mlflow_name(name), str(value)[:6000]) for name, value in settings.config.items()]
            for start in range(0, len(params), 100):  # the limit of one call
                self.client.log_batch(self.run_id, params=params[start : start + 100])

    def write(self, rows: list[Row], first: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        first, self.created = (0 if self.created else first), False
        for row in rows[first:] if self.resumed else ():
            for name in row.values.keys() - self.old_steps.keys():
                self.old_steps[name] = {metric.step for metric in self.client.get_metric_history(self.run_id, name)}
        metrics = [
            Metric(name, value, now, row.step)
            for row in rows[first:]
            for name, value in row.values.items()
            if row.step not in self.old_steps.get(name, ())
        ]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        for row in rows[first:]:
            for name, text in row.texts.items():
                self.client.set_tag(self.run_id, f"{mlflow_name(name)}.step_{row.step}", text[:5000])

    def close(self, *, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class Wandb:
    """A wandb run with a fixed id, offline in RUN/wandb unless WANDB_MODE is set; each driver that writes adds a part to it."""

    def __init__(self, settings: TrackerSettings):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        wandb_settings = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_service_wait=120
        )
        self.run = wandb.init(
            project=settings.project, name=settings.name, id=settings.identity, resume="allow", dir=str(settings.root),
            mode=mode, config=settings.config, settings=wandb_settings,
        )  # fmt: skip
        self.run.define_metric("*", step_metric=UPDATES)
        self.run.define_metric("reward_model/*", step_metric=REWARD_UPDATES)

    def write(self, rows: list[Row], first: int) -> None:
        for index, row in enumerate(rows[first:], start=first):
            self.run.log({**row.values, **row.texts, row.axis: row.step}, step=index, commit=True)

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": Wandb}


def mlflow_name(name: str) -> str:
    """Returns a name that MLflow accepts."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]
