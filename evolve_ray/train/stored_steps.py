"""Stored steps: a training stores its state from time to time, so that a killed training continues from the last stored step."""

import json
import shutil
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError
from evolve_ray.store.manifest import commit, read_manifest
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.spec import TrainSpec


class StoredSteps:
    """A stored step is a folder that all ranks write together, committed with a manifest. A new one replaces the one before."""

    def __init__(self, spec: TrainSpec, collectives: Collectives):
        self.spec, self.collectives = spec, collectives

    def folder(self, step: int) -> Path:
        return self.spec.checkpoint.work / "steps" / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The stored steps on disk, whatever `trainer.checkpoint_steps` was when they were stored."""
        return [int(folder.name.removeprefix("step-")) for folder in self.folder(0).parent.glob("step-*")]

    def save(self, engine: Any, step: int, log: list[dict]) -> None:
        """All ranks write their shards to a temporary folder; rank 0 commits it and removes the step before."""
        temporary, is_first = self.folder(step).with_name(f".step-{step:06d}"), self.collectives.rank == 0
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.collectives.barrier()
        engine.save_checkpoint(str(temporary), tag="state", save_latest=False)
        self.collectives.barrier()
        if is_first:
            (temporary / "log.json").write_text(json.dumps(log), encoding="utf-8")
            key, world = self.spec.checkpoint.key, self.collectives.world
            commit(temporary, self.folder(step), stage="step", key=key, step=step, world=world)
            for older in self.steps():
                if older < step:
                    shutil.rmtree(self.folder(older), ignore_errors=True)
        self.collectives.barrier()

    def restore(self, engine: Any, num_steps: int) -> tuple[int, list[dict]]:
        """Returns (the next step, the log before it), from the last stored step whose hashes match its manifest; (0, []) if none.

        Raises UserError if it was stored with another number of workers.
        """
        for step in sorted(self.steps(), reverse=True):
            manifest = read_manifest(self.folder(step), verify=True)
            if manifest is None or not 0 < step < num_steps:
                continue
            if manifest.stats["world"] != self.collectives.world:
                raise UserError(
                    f"trainer.workers: is {self.collectives.world}, but {manifest.folder} was written by "
                    f"{manifest.stats['world']} workers; resume with that number, or delete {manifest.folder} to start this "
                    "training again"
                )
            # DeepSpeed's shards are pickles. They are loaded only because our own manifest has their hashes.
            engine.load_checkpoint(str(manifest.folder), tag="state")
            return step, json.loads(manifest.path("log.json").read_text(encoding="utf-8"))
        return 0, []
