"""The reference log-probabilities of all pairs, computed once under the reference policy and committed.

They come from the same forwards as in the training loop. If the training starts from the reference model, they also come from
the same engine; then the policy's log-probabilities before the first update are equal to them, bit by bit, except for the order
of a batched sum. Any other reference model is loaded first and removed before the training: one model in memory.
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
    """Computes, commits and reads them. `seconds` is the time of the forwards in this attempt, 0 if none were necessary."""

    def __init__(self, spec: TrainSpec, names: tuple[str, ...], pairs: list[dict], collectives: Collectives):
        self.spec, self.names, self.pairs, self.collectives = spec, names, pairs, collectives
        self.seconds = 0.0

    def logps(self, model: ShardedModel, load: Any, reader: Separate, batches: list[list[int]]) -> dict[str, Any]:
        """Returns `{name: logps_P}` of all pairs; computes and commits them if they are not committed. `batches`: one epoch."""
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
            raise UserError(f"{stage.final}: was computed for other pairs; submit with --rerun-changed to compute it again")
        return {name: torch.tensor([row[name] for row in stored], dtype=torch.float32) for name in self.names}

    def compute(self, engine: Any, reader: Separate, batches: list[list[int]]) -> list[dict]:
        """One row for each pair, in their order. Raises NumericsError if a log-probability is not finite."""
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
                    f"check prompt {pair['prompt_id']} and the model {self.spec.reference_model}"
                )
        return [
            {"pair_id": pair["pair_id"], **dict(zip(self.names, row, strict=True))}
            for pair, row in zip(self.pairs, values.tolist(), strict=True)
        ]

    def commit(self, table: list[dict]) -> None:
        """Commits the reference stage."""
        stage = self.spec.reference
        assert stage is not None
        full_rows = [{name: row.get(name) for name in rows.REFERENCE.names} for row in table]
        rows.write_table(stage.start() / "reference.parquet", full_rows, rows.REFERENCE)
        stage.commit(
            num_in=len(self.pairs), num_rows=len(table), policy=self.spec.training.reference, model=self.spec.reference_hash
        )
