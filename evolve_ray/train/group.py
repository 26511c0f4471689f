"""Runs a training on the worker group of a run, from committed pairs to a committed Hugging Face checkpoint.

This is the driver's side: it starts the group (`trainings.py`), gives it the training, starts it anew if its controller is lost,
and raises the errors of its ranks.
"""

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from evolve_ray.errors import ResourceError, first_line, unpack
from evolve_ray.pools.actors import TRAINERS, Actors, PoolOptions, Pools
from evolve_ray.store.manifest import Manifest
from evolve_ray.train.spec import TrainSpec
from evolve_ray.train.trainings import Trainings, worker

STOP_S = 30.0  # after that the group is killed


class WorkerGroup(Actors):
    """The actor that runs a worker group, as a pool of the size of the group."""

    def stop(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.get(self[0].stop.remote(), timeout=STOP_S)
        super().stop()
        free_places(self.options)


def fit(spec: TrainSpec, storage: Path, pools: Pools) -> Manifest:
    """Runs the training until its checkpoint is committed, and returns the manifest; the group stays open in `pools`.

    The files of Ray Train go to `storage`. It restarts a group that lost a rank, up to `trainer.max_failures` times. If its
    controller process is lost, or the restarts were used up by earlier trainings, this function starts a new
    group, also up to `trainer.max_failures` times. Raises ResourceError if processes die more often than that.
    """
    allowed = spec.trainer.max_failures
    for attempt in itertools.count(1):
        group = opened(spec, storage, pools)
        error_file = storage / f"error-{spec.checkpoint.key[:12]}-{attempt}.json"
        ended = call(group, spec, error_file)
        if ended is None:
            break
        pools.close(TRAINERS)
        raise_rank_error(error_file)
        if not ended["lost"]:
            raise RuntimeError(ended["traceback"] or "the worker group ended without an error and without a checkpoint")
        if attempt > allowed or (ended["begun"] > allowed and not ended["controller"]):
            raise ResourceError(
                f"{spec.checkpoint.final.name}: processes of the training died more often than trainer.max_failures "
                f"({allowed}) allows; see their logs in the Ray dashboard (often memory), then submit the same command again: "
                f"{ended['lost']}"
            )
    manifest = spec.checkpoint.committed()
    assert manifest is not None, "a training is done when its checkpoint is committed"
    return manifest


def free_places(group: PoolOptions) -> None:
    """Frees what a group has reserved whose controller was lost: Ray Train finds that out late, and without a dashboard never.

    Reservations are told from those of others by their shape and by this job, whose id ends theirs.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    shape = {name: round(size, 3) for name, size in (("CPU", group.cpus), ("GPU", group.gpus)) if size}
    for name, place in placement_group_table().items():
        parts = [{key: round(size, 3) for key, size in part.items()} for part in place["bundles"].values()]
        if name.endswith(job) and place["state"] != "REMOVED" and parts == [shape] * group.actors:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def opened(spec: TrainSpec, storage: Path, pools: Pools) -> Actors:
    """The worker group of the run; starts it if it is not open."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if (group := pools.opened(TRAINERS)) is None:
        shutil.rmtree(storage, ignore_errors=True)
        storage.mkdir(parents=True)
        trainer, node = spec.trainer, ray.get_runtime_context().get_node_id()
        settings = {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
        actor = ray.remote(Trainings).options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env={"env_vars": settings},
        )
        size = (trainer.workers, trainer.cpus_per_worker, float(trainer.use_gpu))
        options = PoolOptions(TRAINERS, Trainings, *size, restarts=trainer.max_failures)
        group = WorkerGroup([actor.remote(trainer, storage, worker)], options)
        pools.keep(group)
    return group


def call(group: Actors, spec: TrainSpec, error_file: Path) -> dict[str, Any] | None:
    """None if the training is done, else how the group ended."""
    import ray

    try:
        return ray.get(group[0].fit.remote(spec, str(error_file)))
    except ray.exceptions.RayActorError as error:
        return {"lost": first_line(error), "controller": True, "traceback": "", "begun": 0}


def raise_rank_error(error_file: Path) -> None:
    """Raises on the driver the error that a rank wrote to its file; does nothing if there is no file."""
    if error_file.exists():
        packed = json.loads(error_file.read_text(encoding="utf-8"))
        raise RuntimeError(packed["traceback"]) if "traceback" in packed else unpack(packed)
