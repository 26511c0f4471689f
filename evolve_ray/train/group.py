"""Runs a Ray Train worker group with DeepSpeed ZeRO-3, from committed pairs to a committed Hugging Face checkpoint.

`rank.py` is what each rank does. This file starts the group and brings the errors of the ranks back to the driver.
"""

import itertools
import json
import os
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

from evolve_ray.errors import EvolveError, NumericsError, ResourceError, first_line, is_full_disk, is_full_memory, pack, unpack
from evolve_ray.pools.session import THREADS_ENV
from evolve_ray.store.files import disk_error, write_atomic
from evolve_ray.store.manifest import Manifest
from evolve_ray.train.spec import TrainSpec


def fit(spec: TrainSpec, storage: Path) -> Manifest:
    """Runs the worker group until the checkpoint is committed, and returns its manifest.

    The files of Ray Train go to `storage`, which is removed at the end. Ray Train restarts a group that lost a rank, up to
    `trainer.max_failures` times. If the controller process of Ray Train itself is lost, this function starts a new group, also
    up to `trainer.max_failures` times. Raises ResourceError if processes die more often than that.
    """
    error_file = storage / "error.json"
    for attempt in itertools.count(1):
        shutil.rmtree(storage, ignore_errors=True)
        storage.mkdir(parents=True)
        try:
            torch_trainer(spec, storage, error_file).fit()
            break
        except Exception as error:
            raise_rank_error(error_file)
            death = first_lost_process(error)
            if death is None:
                raise
            # `death is error` if the controller was lost; otherwise Ray Train has already used up its restarts.
            if death is not error or attempt > spec.trainer.max_failures:
                raise ResourceError(
                    f"{spec.checkpoint.final.name}: processes of the training died more often than trainer.max_failures "
                    f"({spec.trainer.max_failures}) allows; see their logs in the Ray dashboard (often memory), then submit the "
                    f"same command again: {first_line(death)}"
                ) from None
    raise_rank_error(error_file)
    shutil.rmtree(storage, ignore_errors=True)
    manifest = spec.checkpoint.committed()
    assert manifest is not None, "the worker group ended without an error and without a checkpoint"
    return manifest


def first_lost_process(error: Exception) -> Exception | None:
    """Ray's error of the first process whose loss ended the training; None if there was another cause."""
    from ray.exceptions import RayActorError

    failures = getattr(error, "worker_failures", {0: error})  # by rank
    causes = [getattr(failures[rank], "health_check_failure", failures[rank]) for rank in sorted(failures)]
    return next((cause for cause in causes if isinstance(cause, RayActorError)), None)


def torch_trainer(spec: TrainSpec, storage: Path, error_file: Path) -> Any:
    """The TorchTrainer of Ray Train that runs the worker group."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    env = THREADS_ENV | {"DS_ACCELERATOR": "cuda" if spec.trainer.use_gpu else "cpu"}
    env |= {name: str(value) for name, value in spec.trainer.env.items()}
    return TorchTrainer(
        worker,
        train_loop_config={"spec": spec, "error": str(error_file)},
        torch_config=TorchConfig(backend="nccl" if spec.trainer.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=spec.trainer.workers,
            use_gpu=spec.trainer.use_gpu,
            resources_per_worker={"CPU": spec.trainer.cpus_per_worker, **({"GPU": 1} if spec.trainer.use_gpu else {})},
        ),
        run_config=RunConfig(
            # A new name for each group, so that Ray Train restores nothing: a group resumes from our own stored steps.
            name=f"{spec.checkpoint.key[:12]}-{os.getpid()}-{time.time_ns()}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=spec.trainer.max_failures),
            worker_runtime_env={"env_vars": env},
        ),
    )


def worker(config: dict) -> None:
    """One rank of the group (`train_loop_per_worker` of Ray Train).

    Ray Train restarts the group after any error. That is right if a rank is lost, which the other ranks see as a RuntimeError of
    a collective operation, or if the actor of Ray Train that synchronises the ranks is lost. Any other error would only happen
    again, so it is written to a file and ends the group. A full disk and a full memory also end it, although torch raises
    RuntimeErrors for them too.
    """
    error_file = Path(config["error"])
    if error_file.exists():
        return
    from ray.exceptions import RayActorError

    from evolve_ray.train import deepspeed_ops
    from evolve_ray.train.rank import Rank

    deepspeed_ops.lock_build_folder()
    try:
        Rank(config["spec"]).run()
    except Exception as error:
        if is_full_disk(error):
            error = disk_error(config["spec"].checkpoint.work, error)
        elif is_full_memory(error):
            error = ResourceError(
                f"{config['spec'].checkpoint.final.name}: a rank of the training ran out of memory: {first_line(error)}; "
                "lower training.micro_pairs or trainer.max_tokens, set trainer.gradient_checkpointing, use more "
                "trainer.workers, or offload with trainer.deepspeed; jobs/iterate.py --plan shows what fits"
            )
        elif isinstance(error, RuntimeError | RayActorError):
            raise
        packed = pack(error) if isinstance(error, EvolveError) else {"traceback": traceback.format_exc()}
        write_atomic(error_file, json.dumps(packed).encode())
        if not isinstance(error, NumericsError):  # all ranks raise a NumericsError together, so all of them return
            raise error


def raise_rank_error(error_file: Path) -> None:
    """Raises on the driver the error that a rank wrote to its file; does nothing if there is no file."""
    if error_file.exists():
        packed = json.loads(error_file.read_text(encoding="utf-8"))
        raise RuntimeError(packed["traceback"]) if "traceback" in packed else unpack(packed)
