"""Training: a Ray Train worker group with DeepSpeed ZeRO-3, from committed pairs to a committed Hugging Face checkpoint.

What a rank of the group does is in `rank.py`; here is what the driver hands to it, and how its errors come back.
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
from evolve_ray.store.files import disk_error, write_atomic
from evolve_ray.store.manifest import Manifest
from evolve_ray.train.spec import TrainSpec


def fit(spec: TrainSpec, storage: Path) -> Manifest:
    """Runs the worker group until the checkpoint is committed; its own files go to `storage` and are removed at the end.

    Ray Train begins a group anew that lost a rank, `trainer.max_failures` times; a group whose controller, a process of Ray
    Train's own, was lost is begun anew here, as often. Raises ResourceError where processes die more often than that.
    """
    kept = storage / "error.json"
    for lost in itertools.count(1):
        shutil.rmtree(storage, ignore_errors=True)
        storage.mkdir(parents=True)
        try:
            group(spec, storage, kept).fit()
            break
        except Exception as error:
            raise_kept(kept)
            death = first_death(error)
            if death is None:
                raise
            if death is not error or lost > spec.trainer.max_failures:  # Ray Train gave its group up, or its controller died
                raise ResourceError(
                    f"{spec.checkpoint.final.name}: processes of the training died more often than trainer.max_failures "
                    f"({spec.trainer.max_failures}) allows; see their logs in the Ray dashboard (often memory), then submit the "
                    f"same command again: {first_line(death)}"
                ) from None
    raise_kept(kept)
    shutil.rmtree(storage, ignore_errors=True)
    manifest = spec.checkpoint.committed()
    assert manifest is not None, "the worker group ended without an error and without a checkpoint"
    return manifest


def first_death(error: Exception) -> Exception | None:
    """What Ray says of the first process whose loss ended a training; None where it was something else."""
    from ray.exceptions import RayActorError

    failures = getattr(error, "worker_failures", {0: error})  # by rank
    causes = [getattr(failures[rank], "health_check_failure", failures[rank]) for rank in sorted(failures)]
    return next((cause for cause in causes if isinstance(cause, RayActorError)), None)


def group(spec: TrainSpec, storage: Path, kept: Path) -> Any:
    """The worker group as Ray Train takes it (a TorchTrainer)."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    env = {"DS_ACCELERATOR": "cuda" if spec.trainer.use_gpu else "cpu"}
    env |= {name: str(value) for name, value in spec.trainer.env.items()}
    return TorchTrainer(
        worker,
        train_loop_config={"spec": spec, "error": str(kept)},
        torch_config=TorchConfig(backend="nccl" if spec.trainer.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=spec.trainer.workers,
            use_gpu=spec.trainer.use_gpu,
            resources_per_worker={"CPU": spec.trainer.cpus_per_worker, **({"GPU": 1} if spec.trainer.use_gpu else {})},
        ),
        run_config=RunConfig(
            # A name that no earlier group used: our own committed steps are what a new worker group resumes from.
            name=f"{spec.checkpoint.key[:12]}-{os.getpid()}-{time.time_ns()}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=spec.trainer.max_failures),
            worker_runtime_env={"env_vars": env},
        ),
    )


def worker(config: dict) -> None:
    """One rank of the group (`train_loop_per_worker` of Ray Train).

    Ray restarts the group after any error. That is right for a lost rank, whose peers see a RuntimeError of the collective,
    and for the actor of Ray Train at which ranks meet; any other error would only come again, so it is kept in a file and
    ends the group. So do a full disk and a full memory, which torch tells as RuntimeErrors too.
    """
    kept = Path(config["error"])
    if kept.exists():
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
                f"{config['spec'].checkpoint.final.name}: a rank of the training has too little memory: {first_line(error)}; "
                "lower training.micro_pairs or trainer.max_tokens, set trainer.gradient_checkpointing, take more "
                "trainer.workers, or offload with trainer.deepspeed; jobs/iterate.py --plan tells what fits"
            )
        elif isinstance(error, RuntimeError | RayActorError):
            raise
        told = pack(error) if isinstance(error, EvolveError) else {"traceback": traceback.format_exc()}
        write_atomic(kept, json.dumps(told).encode())
        if not isinstance(error, NumericsError):  # which all ranks raise together
            raise error


def raise_kept(path: Path) -> None:
    """Raises on the driver what a rank kept."""
    if path.exists():
        told = json.loads(path.read_text(encoding="utf-8"))
        raise RuntimeError(told["traceback"]) if "traceback" in told else unpack(told)
