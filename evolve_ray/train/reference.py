"""The reference log-probabilities: of all pairs under the reference policy, computed once and committed.

They come from the very forwards of the training loop, and through the same engine where the reference is the model that the
training starts from: then the policy's log-probabilities before the first update are these, bit by bit up to the order of a
batched sum. Another reference model is loaded first and makes room: one model in memory.
"""

import time
from typing import Any

from evolve_ray.errors import NumericsError, UserError
from evolve_ray.store import rows
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.forwards import Separate
from evolve_ray.train.model import ShardedModel
from evolve_ray.train.spec import TrainSpec


class Reference:
    """`seconds` is what its forwards took in this attempt, 0 where they were committed already."""

    def __init__(self, spec: TrainSpec, names: tuple[str, ...], pairs: list[dict], collectives: Collectives):
        self.spec, self.names, self.pairs, self.collectives = spec, names, pairs, collectives
        self.seconds = 0.0

    def logps(self, model: ShardedModel, load: Any, reader: Separate, batches: list[list[int]]) -> dict[str, Any]:
        """`{name: logps_P}` of all pairs: read if committed, else computed; `batches` are those of one epoch."""
        import torch

        stage = self.spec.reference
        assert stage is not None
        manifest = stage.committed()
        if manifest is None:
            load(self.spec.reference_model, frozen=self.spec.reference_model != self.spec.model)
            started = time.monotonic()
            table = self.compute(model.engine, reader, batches)
            self.seconds = time.monotonic() - started
            if self.collectives.rank == 0:
                self.commit(table)
            self.collectives.barrier()
            manifest = stage.committed()
            assert manifest is not None
        stored = rows.read_table(manifest.path("reference.parquet"))
        if [row["pair_id"] for row in stored] != [pair["pair_id"] for pair in self.pairs]:
            raise UserError(f"{stage.final}: belongs to other pairs; submit with --rerun-changed to compute it again")
        return {name: torch.tensor([row[name] for row in stored], dtype=torch.float32) for name in self.names}

    def compute(self, engine: Any, reader: Separate, batches: list[list[int]]) -> list[dict]:
        """One row a pair, in their order. Raises NumericsError for a pair whose log-probability is not finite."""
        import torch

        values = torch.zeros(len(self.pairs), len(self.names), dtype=torch.float64)
        with torch.no_grad():
            for batch in batches:
                for part in reader.parts(batch):
                    logps, _ = reader.values(engine, part)
                    for position, (row, weight) in enumerate(part.pairs):
                        if weight:
                            values[row] = torch.stack([logps[name][position] for name in self.names]).double().cpu()
        self.collectives.all_reduce(values)
        for pair, finite in zip(self.pairs, values.isfinite().all(dim=1).tolist(), strict=True):
            if not finite:
                raise NumericsError(
                    f"reference: the log-probability of pair {pair['pair_id']} is not finite; "
                    f"look at prompt {pair['prompt_id']} and at the model {self.spec.reference_model}"
                )
        return [
            {"pair_id": pair["pair_id"], **dict(zip(self.names, row, strict=True))}
            for pair, row in zip(self.pairs, values.tolist(), strict=True)
        ]

    def commit(self, table: list[dict]) -> None:
        stage = self.spec.reference
        assert stage is not None
        filled = [{name: row.get(name) for name in rows.REFERENCE.names} for row in table]
        rows.write_table(stage.start() / "reference.parquet", filled, rows.REFERENCE)
        stage.commit(
            num_in=len(self.pairs), num_rows=len(table), policy=self.spec.training.reference, model=self.spec.reference_hash
        )
