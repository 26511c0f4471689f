"""The worker group of Ray Train with DeepSpeed ZeRO-3, as a Ray actor that gives it one training after the other.

A group takes ten to twenty seconds to start: its processes load torch and DeepSpeed. So it outlives a training, where the cluster
has room for it beside engines and scorers. `group.py` is the driver's side, and `rank.py` what each rank does for one training.
"""

import asyncio
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.config.options import Trainer
from evolve_ray.errors import EvolveError, NumericsError, ResourceError, first_line, is_full_disk, is_full_memory, pack
from evolve_ray.pools.session import THREADS_ENV
from evolve_ray.store.files import disk_error, write_atomic
from evolve_ray.train.spec import TrainSpec


class Trainings:
    """The Ray actor that runs a worker group; its ranks ask it for the next training, and rank 0 says when one is done.

    It runs the group itself, so that the group ends with it and it ends with the driver. Errors come back as data, because those
    of Ray Train hold what only their own processes can unpack.
    """

    def __init__(self, trainer: Trainer, storage: Path, worker: Callable[[dict], None]):
        self.trainer, self.storage, self.worker = trainer, storage, worker
        self.number, self.begun = 0, 0
        self.given: tuple[int, TrainSpec | None, str] = (0, None, "")
        self.changed, self.finished = asyncio.Event(), asyncio.Event()
        self.group: asyncio.Future | None = None

    async def fit(self, spec: TrainSpec, error_file: str) -> dict[str, Any] | None:
        """Runs one training; returns None when it is done, else how the group ended, and how often its ranks had begun it."""
        self.begun, self.finished = 0, asyncio.Event()
        self.give(spec, error_file)
        if self.group is None or self.group.done():
            self.group = asyncio.ensure_future(asyncio.to_thread(self.run))
        finished = asyncio.ensure_future(self.finished.wait())
        await asyncio.wait([self.group, finished], return_when=asyncio.FIRST_COMPLETED)
        if finished.done():
            return None
        finished.cancel()
        return self.group.result() | {"begun": self.begun}

    def give(self, spec: TrainSpec | None, error_file: str = "") -> None:
        self.number += 1
        self.given = (self.number, spec, error_file)
        self.changed.set()
        self.changed = asyncio.Event()

    def run(self) -> dict[str, Any]:
        """Runs the group until it ends: {"lost": the first lost process, or "", "controller": whether that was it, ...}."""
        import ray

        handle = ray.get_runtime_context().current_actor
        return outcome(torch_trainer(self.trainer, self.storage, handle, self.worker).fit)

    async def next(self, last: int) -> tuple[int, TrainSpec | None, str]:
        """Returns (number, spec, error file) of the training after number `last`, as soon as there is one; no spec: the end."""
        while self.given[0] <= last:
            await self.changed.wait()
        return self.given

    async def begin(self, number: int) -> None:
        self.begun += number == self.number

    async def done(self, number: int) -> None:
        if number == self.number:
            self.finished.set()

    async def stop(self) -> None:
        """Ends the group in good order, so that Ray Train gives back what it has reserved."""
        self.give(None)
        if self.group is not None:
            await self.group


def outcome(fit: Callable[[], Any]) -> dict[str, Any]:
    """How a run of Ray Train ended, as data."""
    try:
        fit()
    except Exception as error:
        death = first_lost_process(error)
        # `death is error` if the controller was lost; otherwise Ray Train has already used up its restarts.
        lost = "" if death is None else first_line(death)
        return {"lost": lost, "controller": death is error, "traceback": traceback.format_exc()}
    return {"lost": "", "controller": False, "traceback": ""}


def first_lost_process(error: Exception) -> Exception | None:
    """Ray's error of the first process whose loss ended the group; None if there was another cause."""
    from ray.exceptions import RayActorError

    failures = getattr(error, "worker_failures", {0: error})  # by rank
    causes = [getattr(failures[rank], "health_check_failure", failures[rank]) for rank in sorted(failures)]
    return next((cause for cause in causes if isinstance(cause, RayActorError)), None)


def torch_trainer(trainer: Trainer, storage: Path, trainings: Any, worker: Callable[[dict], None]) -> Any:
    """The TorchTrainer of Ray Train that runs the worker group; its own files go to `storage`."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    env = THREADS_ENV | {"DS_ACCELERATOR": "cuda" if trainer.use_gpu else "cpu"}
    env |= {name: str(value) for name, value in trainer.env.items()}
    return TorchTrainer(
        worker,
        train_loop_config={"trainings": trainings},
        torch_config=TorchConfig(backend="nccl" if trainer.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=trainer.workers,
            use_gpu=trainer.use_gpu,
            resources_per_worker={"CPU": trainer.cpus_per_worker, **({"GPU": 1} if trainer.use_gpu else {})},
        ),
        run_config=RunConfig(
            # A new name for each group, so that Ray Train restores nothing: a group resumes from our own stored steps.
            name=f"trainings-{os.getpid()}-{time.time_ns()}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=trainer.max_failures),
            worker_runtime_env={"env_vars": env},
        ),
    )


def worker(config: dict) -> None:
    """One rank of the group (`train_loop_per_worker` of Ray Train): one training after the other."""
    import ray
    from ray.train import get_context

    from evolve_ray.train import deepspeed_ops

    deepspeed_ops.lock_build_folder()
    trainings, first, number = config["trainings"], get_context().get_world_rank() == 0, 0
    while True:
        number, spec, error_file = ray.get(trainings.next.remote(number))
        if spec is None:
            return
        if first:
            trainings.begin.remote(number)
        if not run_rank(spec, Path(error_file)):
            return
        if first:
            ray.get(trainings.done.remote(number))


def run_rank(spec: TrainSpec, error_file: Path) -> bool:
    """One training of a rank; returns whether it is done.

    Ray Train restarts the group after any error. That is right if a rank is lost: the other ranks see it as a RuntimeError of a
    collective operation, or as any error at all once Ray Train has taken their process group away. It is also right if the actor
    of Ray Train that synchronises the ranks is lost. Any other error would only happen again, so it is written to a file and ends
    the group. A full disk and a full memory also end it, although torch raises RuntimeErrors for them too.
    """
    if error_file.exists():
        return False
    from ray.exceptions import RayActorError
    from torch import distributed

    from evolve_ray.train.rank import Rank

    joined = distributed.is_initialized()
    try:
        Rank(spec).run()
    except Exception as error:
        if is_full_disk(error):
            error = disk_error(spec.checkpoint.work, error)
        elif is_full_memory(error):
            error = ResourceError(
                f"{spec.checkpoint.final.name}: a rank of the training ran out of memory: {first_line(error)}; "
                "lower training.micro_pairs or trainer.max_tokens, set trainer.gradient_checkpointing, use more "
                "trainer.workers, or offload with trainer.deepspeed; jobs/iterate.py --plan shows what fits"
            )
        elif isinstance(error, RuntimeError | RayActorError) or (joined and not distributed.is_initialized()):
            raise
        packed = pack(error) if isinstance(error, EvolveError) else {"traceback": traceback.format_exc()}
        write_atomic(error_file, json.dumps(packed).encode())
        if not isinstance(error, NumericsError):  # all ranks raise a NumericsError together, so all of them return
            raise error
        return False
    return True
