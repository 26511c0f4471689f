"""Steps of a training that are stored on the way, so that a killed training continues from the last of them."""

import json
import shutil
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError
from evolve_ray.store.manifest import commit, read_manifest
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.spec import TrainSpec


class StoredSteps:
    """Each step is a folder with a manifest, committed by all ranks together; the newest takes the place of the one before."""

    def __init__(self, spec: TrainSpec, collectives: Collectives):
        self.spec, self.collectives, self.interval = spec, collectives, spec.trainer.checkpoint_steps

    def folder(self, step: int) -> Path:
        return self.spec.checkpoint.work / "steps" / f"step-{step:06d}"

    def save(self, engine: Any, step: int, log: list[dict]) -> None:
        """All ranks write their shards aside; rank 0 commits the folder and removes the one before."""
        aside, first = self.folder(step).with_name(f".step-{step:06d}"), self.collectives.rank == 0
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.collectives.barrier()
        engine.save_checkpoint(str(aside), tag="state", save_latest=False)
        self.collectives.barrier()
        if first:
            (aside / "log.json").write_text(json.dumps(log), encoding="utf-8")
            key, world = self.spec.checkpoint.key, self.collectives.world
            commit(aside, self.folder(step), stage="step", key=key, step=step, world=world)
            shutil.rmtree(self.folder(step - self.interval), ignore_errors=True)
        self.collectives.barrier()

    def restore(self, engine: Any, num_steps: int) -> tuple[int, list[dict]]:
        """(the step to continue with, the log up to it), from the last committed step whose bytes are what its manifest says."""
        for step in range((num_steps - 1) // self.interval * self.interval, 0, -self.interval):
            manifest = read_manifest(self.folder(step), verify=True)
            if manifest is None:
                continue
            if manifest.stats["world"] != self.collectives.world:
                raise UserError(
                    f"trainer.workers: is {self.collectives.world}, but {manifest.folder} was written by "
                    f"{manifest.stats['world']}; resume with that many workers, or delete {manifest.folder} to start this "
                    "training anew"
                )
            # DeepSpeed's shards are pickles: they are loaded only because their hashes are in our own manifest.
            engine.load_checkpoint(str(manifest.folder), tag="state")
            return step, json.loads(manifest.path("log.json").read_text(encoding="utf-8"))
        return 0, []
