"""One rank of the training group: its model shards, its share of the pairs, the loop over steps, and what it leaves behind.

The same group first computes the reference log-probabilities and commits them, then trains: no second model is ever in
memory. Every few steps all ranks save into a folder that is committed with a manifest; after a crash the group continues
from the last committed step with the same pairs in the same order. A non-finite loss or gradient stops all ranks before the
optimiser touches a weight.
"""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from evolve_ray import builds, card
from evolve_ray.errors import NumericsError, UserError
from evolve_ray.schedule import batches, learning_rate
from evolve_ray.store import rows
from evolve_ray.store.manifest import CARD, commit, read_manifest
from evolve_ray.train import TrainSpec, deepspeed_config

PROGRESS_S = 5.0  # seconds between two events of progress; the last step is always told


class Rank:
    """One rank: model shards, this rank's share of the pairs, and the loop over steps."""

    def __init__(self, spec: TrainSpec):
        import deepspeed
        import torch
        from ray.train.torch import get_device

        from evolve_ray import forwards, objective
        from evolve_ray.models.chat import Chat

        self.torch, self.deepspeed = torch, deepspeed
        self.spec, self.training = spec, spec.training
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = get_device()
        self.objective = objective.find(spec.training)
        self.total = objective.total
        self.chat = Chat(spec.model)
        self.pairs = rows.read_table(Path(spec.pairs))
        self.batches = batches(len(self.pairs), spec.training, seed=spec.seed, iteration=spec.iteration)
        self.engine: Any = None
        self.seconds = 0.0  # of the reference and of updates, in this attempt
        given = (spec, self.chat, self.pairs, self.objective.needs, self.rank, self.world, self.device)
        self.trees = spec.trainer.forward == "tree" and not self.objective.scores
        if self.trees:
            self.reader: Any = forwards.Trees(*given, self.agree)
        else:
            self.reader = (forwards.Scores if self.objective.scores else forwards.Separate)(*given)
        # An all-reduce for inference, which no training calls; DeepSpeed would compile it now, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if spec.trainer.use_gpu else "gloo", auto_mpi_discovery=False, verbose=False
        )

    @builds.refusals_named()
    def load(self, folder: str, *, frozen: bool = False) -> None:
        """The model in `folder` as this rank's engine, in place of the one before; `frozen` has no optimiser."""
        import gc

        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers.integrations import HfDeepSpeedConfig

        from evolve_ray import adapters, tree_check

        if self.engine is not None:
            self.engine.destroy()
            self.engine = None
            gc.collect()
        ds_config = deepspeed_config(self.spec)
        if frozen:
            ds_config.pop("optimizer")
        self._keep = HfDeepSpeedConfig(ds_config)  # while it lives, from_pretrained loads straight into ZeRO-3 shards
        kind = AutoModelForSequenceClassification if self.objective.scores else AutoModelForCausalLM
        model = kind.from_pretrained(folder, dtype=getattr(self.torch, self.spec.dtype), trust_remote_code=False)
        if self.spec.trainer.gradient_checkpointing and not frozen:
            model.gradient_checkpointing_enable()
        model.train()
        if self.spec.trainer.lora_rank and not frozen and not self.objective.scores:
            adapters.adapt(model, self.spec.trainer, self.spec.seed)
        parameters = None if frozen else [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model, read = model, tree_check.tree_model(model, self.device) if self.trees else model
        self.engine, *_ = self.deepspeed.initialize(model=read, model_parameters=parameters, config=ds_config)
        self.folder = folder
        if self.rank == 0:
            self.spec.run.event("model_loaded", iteration=self.spec.iteration, key=self.spec.checkpoint.key)
        if self.trees:
            self.reader.config = model.config
            self.reader.chunked = not any(self.agree([not tree_check.prove(self.engine, read, self.device)]))

    def run(self) -> None:
        import ray.train

        # Before a step is restored: the reference comes from whole models, also if it must be made again after a crash.
        reference = self.reference() if self.objective.reference else {}
        if self.engine is None or self.folder != self.spec.model:
            self.load(self.spec.model)
        start, log = self.restore()
        told, untold = time.monotonic(), len(log)
        for step in range(start, len(self.batches)):
            begun = time.monotonic()
            log.append(self.update(step, reference))
            self.seconds += time.monotonic() - begun
            last = step + 1 == len(self.batches)
            if self.rank == 0 and (last or time.monotonic() - told > PROGRESS_S):
                here = {"iteration": self.spec.iteration, "key": self.spec.checkpoint.key, "num_steps": len(self.batches)}
                self.spec.run.event("training", **here, **log[-1], steps=log[untold:])
                told, untold = time.monotonic(), len(log)
            if (step + 1) % self.spec.trainer.checkpoint_steps == 0 and not last:
                self.save(step + 1, log)
        # Once: Ray Train takes reports at its polling interval and blocks the workers of a quicker loop.
        ray.train.report({"num_steps": len(self.batches), **log[-1]})
        self.export(log)

    def update(self, step: int, reference: dict[str, Any]) -> dict[str, float]:
        """One optimiser update; returns its metrics, the same on every rank."""
        torch = self.torch
        batch = self.batches[step]
        rate = learning_rate(step, len(self.batches), self.training)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, float] = {}
        parts = self.reader.parts(batch)
        for number, part in enumerate(parts):
            indices = [row for row, _ in part.pairs]
            weights = torch.tensor([weight for _, weight in part.pairs], device=self.device)
            self.engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            policy, lengths = self.reader.values(self.engine, part)
            given = {name: values[indices].to(self.device) for name, values in reference.items()}
            loss_B, metrics = self.total(self.objective, policy, given, lengths, self.training)
            self.stop_if_not_finite(loss_B, step, indices)
            # DeepSpeed divides by the micro-batches of its configuration and averages over ranks; `weights` undo both.
            self.engine.backward((loss_B * weights).sum())
            self.engine.step()
            real = weights > 0
            for name, values in {"loss": loss_B, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + values.detach()[real].double().sum().item()
        if getattr(self.engine.optimizer, "overflow", False):
            ids = [self.pairs[row]["pair_id"] for row in batch]
            raise NumericsError(
                f"training step {step}: the gradient is not finite, so no weight was changed; pairs {ids[:8]}; "
                "lower learning_rate or look at these pairs, then submit again"
            )
        totals = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64)
        self.all_reduce(totals)
        means = {name: value / len(batch) for name, value in zip(sorted(sums), totals.tolist(), strict=True)}
        norm = self.engine.get_global_grad_norm()
        return {"step": step, "num_pairs": len(batch), "learning_rate": rate, "gradient_norm": float(norm or 0.0), **means}

    def all_reduce(self, values: Any) -> None:
        moved = values.to(self.device)
        self.torch.distributed.all_reduce(moved)
        values.copy_(moved)

    def agree(self, values: list[int]) -> list[int]:
        """The greatest over all ranks, number by number."""
        moved = self.torch.tensor(values, device=self.device)
        self.torch.distributed.all_reduce(moved, op=self.torch.distributed.ReduceOp.MAX)
        return moved.tolist()

    def stop_if_not_finite(self, loss_B: Any, step: int, indices: list[int]) -> None:
        """All ranks stop together, before the backward pass, if any rank's loss is not finite.

        They all say the same sentence, with the rank and its pairs: one of theirs reaches the driver, whichever it is.
        """
        bad = {row for row, finite in zip(indices, loss_B.isfinite().tolist(), strict=True) if not finite}
        if not any(self.agree([int(bool(bad))])):
            return
        batch = self.batches[step]
        ranks_here = [int(bool(bad) and rank == self.rank) for rank in range(self.world)]
        found = self.agree(ranks_here + [int(row in bad) for row in batch])
        ranks = ", ".join(str(rank) for rank in range(self.world) if found[rank])
        ids = [self.pairs[row]["pair_id"] for row, hit in zip(batch, found[self.world :], strict=True) if hit]
        raise NumericsError(
            f"training step {step}: the loss is not finite on rank {ranks}, pairs {ids}; no weight was changed; "
            "look at these pairs and their reference log-probabilities, then submit again"
        )

    def reference(self) -> dict[str, Any]:
        """`{name: logps_P}` of all pairs under the reference policy: read if committed, else computed.

        Computed with the very forwards of the training loop, and through the same engine where the reference is the
        model that this phase starts from: then the policy's log-probabilities before the first update are these, bit by bit
        up to the order of a batched sum. Another reference model is loaded first and makes room: one model in memory.
        """
        stage = self.spec.reference
        assert stage is not None
        names = self.objective.needs
        manifest = stage.committed()
        if manifest is None:
            self.load(self.spec.reference_model, frozen=self.spec.reference_model != self.spec.model)
            begun = time.monotonic()
            table = self.compute_reference(names)
            self.seconds += time.monotonic() - begun
            if self.rank == 0:
                work = stage.start()
                filled = [{name: row.get(name) for name in rows.REFERENCE.names} for row in table]
                rows.write_table(work / "reference.parquet", filled, rows.REFERENCE)
                stage.commit(
                    num_in=len(self.pairs), num_rows=len(table), policy=self.training.reference, model=self.spec.reference_hash
                )
            self.torch.distributed.barrier()
            manifest = stage.committed()
            assert manifest is not None
        stored = rows.read_table(manifest.path("reference.parquet"))
        if [row["pair_id"] for row in stored] != [pair["pair_id"] for pair in self.pairs]:
            raise UserError(f"{stage.final}: belongs to other pairs; submit with --rerun-changed to compute it again")
        return {name: self.torch.tensor([row[name] for row in stored], dtype=self.torch.float32) for name in names}

    def compute_reference(self, names: tuple[str, ...]) -> list[dict]:
        torch = self.torch
        values = torch.zeros(len(self.pairs), len(names), dtype=torch.float64)
        epoch = self.batches[: math.ceil(len(self.pairs) / self.training.batch_pairs)]
        with torch.no_grad():
            for batch in epoch:
                for part in self.reader.parts(batch):
                    logps, _ = self.reader.values(self.engine, part)
                    for position, (row, weight) in enumerate(part.pairs):
                        if weight:
                            values[row] = torch.stack([logps[name][position] for name in names]).double().cpu()
        self.all_reduce(values)
        for pair, row in zip(self.pairs, values.isfinite().all(dim=1).tolist(), strict=True):
            if not row:
                raise NumericsError(
                    f"reference: the log-probability of pair {pair['pair_id']} is not finite; "
                    f"look at prompt {pair['prompt_id']} and at the model {self.spec.reference_model}"
                )
        return [
            {"pair_id": pair["pair_id"], **dict(zip(names, row, strict=True))}
            for pair, row in zip(self.pairs, values.tolist(), strict=True)
        ]

    def step_folder(self, step: int) -> Path:
        return self.spec.checkpoint.work / "steps" / f"step-{step:06d}"

    def save(self, step: int, log: list[dict]) -> None:
        """All ranks write their shards aside; rank 0 commits the folder and removes the one before."""
        aside = self.step_folder(step).with_name(f".step-{step:06d}")
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.torch.distributed.barrier()
        self.engine.save_checkpoint(str(aside), tag="state", save_latest=False)
        self.torch.distributed.barrier()
        if self.rank == 0:
            (aside / "log.json").write_text(json.dumps(log), encoding="utf-8")
            commit(aside, self.step_folder(step), stage="step", key=self.spec.checkpoint.key, step=step, world=self.world)
            before = self.step_folder(step - self.spec.trainer.checkpoint_steps)
            shutil.rmtree(before, ignore_errors=True)
        self.torch.distributed.barrier()

    def restore(self) -> tuple[int, list[dict]]:
        """The last committed step whose bytes are what its manifest says, and the log up to it."""
        interval = self.spec.trainer.checkpoint_steps
        for step in range((len(self.batches) - 1) // interval * interval, 0, -interval):
            manifest = read_manifest(self.step_folder(step), verify=True)
            if manifest is None:
                continue
            if manifest.stats["world"] != self.world:
                raise UserError(
                    f"trainer.workers: is {self.world}, but {manifest.folder} was written by {manifest.stats['world']}; "
                    f"resume with that many workers, or delete {manifest.folder} to start this training anew"
                )
            # DeepSpeed's shards are pickles: they are loaded only because their hashes are in our own manifest.
            self.engine.load_checkpoint(str(manifest.folder), tag="state")
            return step, json.loads(manifest.path("log.json").read_text(encoding="utf-8"))
        return 0, []

    def export(self, log: list[dict]) -> None:
        """Gathers the parameters one by one and commits a Hugging Face folder."""
        from evolve_ray import adapters

        torch = self.torch
        model = self.model
        state, names, bad = {}, [""], 0
        for name, parts, scale in adapters.merged(model):
            names.append(name)
            with self.deepspeed.zero.GatheredParameters(parts):
                if self.rank == 0:
                    state[name] = adapters.merge(parts, scale)
                    bad = bad or len(state) * int(not state[name].isfinite().all())
        (bad,) = self.agree([bad])  # told to all: a rank that is left alone would wait for the others
        if bad:
            raise NumericsError(f"export: the parameter {names[bad]} is not finite; nothing was committed; lower learning_rate")
        if self.rank == 0:
            held = model.state_dict()
            for name, buffer in model.named_buffers():
                if name in held:
                    state[name] = buffer.detach().cpu()
            stage = self.spec.checkpoint
            work = stage.work
            out = work.with_name(f"{work.name}-export")
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            model.save_pretrained(out, state_dict=state, safe_serialization=True)
            self.chat.tokenizer.save_pretrained(out)
            rows.write_jsonl(out / "training_log.jsonl", log)
            reference = self.spec.reference_hash if self.objective.reference else ""
            told = card.unfinished(self.training.objective, self.spec.iteration, len(self.pairs), len(log), reference)
            (out / CARD).write_text(told, encoding="utf-8")
            rows.write_jsonl(out / "rejected.jsonl", [])
            commit(
                out,
                stage.final,
                stage=stage.name,
                key=stage.key,
                inputs=stage.inputs,
                num_in=len(self.pairs),
                num_rows=len(self.pairs),
                num_rejected=0,
                num_steps=len(log),
                train_seconds=round(self.seconds, 3),
            )
            shutil.rmtree(work, ignore_errors=True)
        torch.distributed.barrier()
