"""One rank of the worker group: it computes the reference, takes the optimiser steps, and exports the model, in this order.

The group first computes and commits the reference log-probabilities, and then trains, so there is never a second model in memory.
All ranks store a step every `trainer.checkpoint_steps` steps. After a crash the group continues from the last stored step, with
the same pairs in the same order.
"""

import math
import os
import time
from pathlib import Path
from typing import Any

from evolve_ray.store import rows
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.export import commit_checkpoint, gather
from evolve_ray.train.model import ShardedModel
from evolve_ray.train.reference import Reference
from evolve_ray.train.schedule import batches
from evolve_ray.train.spec import TrainSpec
from evolve_ray.train.stored_steps import StoredSteps

PROGRESS_S = 5.0  # seconds between two `training` events; the last step always writes one


class Rank:
    """One rank: its model shards, its share of the pairs, and the loop over steps."""

    def __init__(self, spec: TrainSpec):
        from ray.train.torch import get_device

        from evolve_ray.models.chat import Chat
        from evolve_ray.train import forwards, objectives
        from evolve_ray.train.steps import Steps

        self.spec, self.collectives = spec, Collectives(get_device())
        self.objective = objectives.find(spec.training)
        rendering = spec.template.rendering
        self.chat = Chat(spec.model, rendering=rendering.for_reward_model if self.objective.scores else rendering)
        self.pairs = rows.read_table(Path(spec.pairs))
        self.batches = batches(len(self.pairs), spec.training, seed=spec.seed, iteration=spec.iteration)
        trees = spec.trainer.forward == "tree" and not self.objective.scores
        self.model = ShardedModel(spec, self.collectives, classifier=self.objective.scores, trees=trees)
        shared = (spec, self.chat, self.pairs, self.objective.sequences, self.collectives)
        if trees:
            self.reader: Any = forwards.Trees(*shared)
        else:
            self.reader = (forwards.Scores if self.objective.scores else forwards.Separate)(*shared)
        wanted = {"tokens": self.objective.tokens, "initial": self.objective.initial}
        self.reference = Reference(spec, self.objective.sequences, self.pairs, self.collectives, **wanted)
        self.steps = Steps(self.pairs, self.batches, spec.training, self.objective, self.reader, self.collectives)
        self.stored = StoredSteps(spec, self.collectives)

    def load(self, folder: str, *, frozen: bool = False) -> None:
        """Loads the model in `folder` in place of the present one."""
        self.model.load(folder, frozen=frozen)
        self.reader.config, self.reader.chunked = self.model.module.config, self.model.chunked
        if self.collectives.rank == 0:
            fields = {"iteration": self.spec.iteration, "key": self.spec.checkpoint.key}
            self.spec.run.event("model_loaded", **fields, pid=os.getpid())

    def run(self) -> None:
        """Does the whole training, from the pairs to the committed checkpoint."""
        import ray.train

        reference: dict[str, Any] = {}
        if self.objective.reference:  # before a stored step is restored, because it is computed from the untrained model
            epoch = self.batches[: math.ceil(len(self.pairs) / self.spec.training.batch_pairs)]
            reference = self.reference.logps(self.model, self.load, self.reader, epoch)
        if self.model.engine is None or self.model.folder != self.spec.model:
            self.load(self.spec.model)
        log, seconds = self.train(reference)
        # Only once: Ray Train takes reports at its polling interval, and would block workers that report more often.
        ray.train.report({"num_steps": len(self.batches), **log[-1]})
        self.export(log, self.reference.seconds + seconds)

    def train(self, reference: dict[str, Any]) -> tuple[list[dict], float]:
        """Takes all steps after the last stored one; returns (log of all steps, seconds of the updates in this attempt)."""
        num_steps, seconds = len(self.batches), 0.0
        start, log = self.stored.restore(self.model.engine, num_steps)
        last_event, num_logged = time.monotonic(), len(log)
        for step in range(start, num_steps):
            started = time.monotonic()
            log.append(self.steps.update(self.model.engine, step, reference))
            seconds += time.monotonic() - started
            last = step + 1 == num_steps
            if self.collectives.rank == 0 and (last or time.monotonic() - last_event > PROGRESS_S):
                fields = {"iteration": self.spec.iteration, "key": self.spec.checkpoint.key, "num_steps": num_steps}
                self.spec.run.event("training", **fields, **log[-1], steps=log[num_logged:])
                last_event, num_logged = time.monotonic(), len(log)
            if (step + 1) % self.spec.trainer.checkpoint_steps == 0 and not last:
                self.stored.save(self.model.engine, step + 1, log)
        return log, seconds

    def export(self, log: list[dict], train_seconds: float) -> None:
        """Gathers the trained model; rank 0 commits it as the checkpoint."""
        state = gather(self.model, self.collectives)
        if self.collectives.rank == 0:
            commit_checkpoint(
                self.spec, self.model.module, state, self.chat, log, len(self.pairs),
                reference=self.objective.reference, train_seconds=train_seconds,
            )  # fmt: skip
        self.collectives.barrier()
