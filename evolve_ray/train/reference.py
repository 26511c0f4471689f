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

    def __init__(
        self, spec: TrainSpec, names: tuple[str, ...], pairs: list[dict], collectives: Collectives, *,
        tokens: bool = False, initial: bool = False,
    ):  # fmt: skip
        """`tokens`: token by token too; `initial`: under the initial policy too."""
        self.spec, self.names, self.pairs, self.collectives, self.tokens = spec, names, pairs, collectives, tokens
        self.initial_names = tuple(map(rows.initial_column, names if initial else ()))
        self.seconds = 0.0

    def logps(self, model: ShardedModel, load: Any, reader: Separate, batches: list[list[int]]) -> dict[str, Any]:
        """Returns `{name: logps_P}` of all pairs; computes and commits them if they are not committed. `batches`: one epoch.

        With `tokens` it also has `{rows.token_column(name): [logps_T] * P}`; with `initial` the same under the initial policy, by
        `rows.initial_column(name)`.
        """
        import torch

        stage = self.spec.reference
        assert stage is not None
        manifest = stage.committed()
        if manifest is None:
            # The reference last: where the training starts from it, it stays loaded.
            initial: list[dict] = []
            if self.initial_names and self.spec.initial_model != self.spec.reference_model:
                initial = self.timed(self.spec.initial_model, model, load, reader, batches)
            table = self.timed(self.spec.reference_model, model, load, reader, batches)
            if self.initial_names:
                under_initial = [
                    {rows.initial_column(name): row[name] for name in row if name != "pair_id"} for row in initial or table
                ]
                table = [row | more for row, more in zip(table, under_initial, strict=True)]
            if self.collectives.rank == 0:
                self.commit(table)
            self.collectives.barrier()
            manifest = stage.committed()
            assert manifest is not None
        stored = rows.read_table(manifest.path("reference.parquet"))
        if [row["pair_id"] for row in stored] != [pair["pair_id"] for pair in self.pairs]:
            raise UserError(f"{stage.final}: was computed for other pairs; submit with --rerun-changed to compute it again")
        names = (*self.names, *self.initial_names)
        columns: dict[str, Any] = {name: torch.tensor([row[name] for row in stored], dtype=torch.float32) for name in names}
        for name in map(rows.token_column, names if self.tokens else ()):
            columns[name] = [torch.tensor(row[name], dtype=torch.float32) for row in stored]
        return columns

    def timed(self, folder: str, model: ShardedModel, load: Any, reader: Separate, batches: list[list[int]]) -> list[dict]:
        """`compute` under the model in `folder`; it counts the seconds."""
        load(folder, frozen=folder != self.spec.model)
        started = time.monotonic()
        table = self.compute(model.engine, reader, batches)
        self.seconds += time.monotonic() - started
        return table

    def compute(self, engine: Any, reader: Separate, batches: list[list[int]]) -> list[dict]:
        """One row for each pair, in their order. Raises NumericsError if a log-probability is not finite."""
        import torch

        values = torch.zeros(len(self.pairs), len(self.names), dtype=torch.float64)
        own: dict[tuple[int, int], Any] = {}  # by pair and sequence: the tokens that this rank computed
        with torch.no_grad():
            for batch in batches:
                for part in reader.parts(batch):
                    if self.tokens:
                        by_token, lengths = reader.token_values(engine, part)
                        logps = {name: logps_BT.sum(1) for name, logps_BT in by_token.items()}
                    else:
                        logps, _ = reader.values(engine, part)
                    for position, (row, weight) in enumerate(part.pairs):
                        if weight:
                            values[row] = torch.stack([logps[name][position] for name in self.names]).double().cpu()
                        if weight and self.tokens:
                            for number, name in enumerate(self.names):
                                own[row, number] = by_token[name][position, : lengths[name][position]].cpu()
        self.collectives.all_reduce(values)
        for pair, finite in zip(self.pairs, values.isfinite().all(dim=1).tolist(), strict=True):
            if not finite:
                raise NumericsError(
                    f"reference: the log-probability of pair {pair['pair_id']} is not finite; "
                    f"check prompt {pair['prompt_id']} and the model {self.spec.reference_model}"
                )
        table = [
            {"pair_id": pair["pair_id"], **dict(zip(self.names, row, strict=True))}
            for pair, row in zip(self.pairs, values.tolist(), strict=True)
        ]
        for number, tokens in enumerate(self.gathered(own) if self.tokens else ()):
            row, position = divmod(number, len(self.names))
            table[row][rows.token_column(self.names[position])] = tokens
        return table

    def gathered(self, own: dict[tuple[int, int], Any]) -> list[list[float]]:
        """The tokens of every sequence of every pair, from the ranks that computed them."""
        import torch

        places = [(row, position) for row in range(len(self.pairs)) for position in range(len(self.names))]
        lengths = torch.tensor([len(own.get(place, ())) for place in places])
        self.collectives.all_reduce(lengths)
        flat = torch.zeros(int(lengths.sum()), dtype=torch.float32)
        parts = flat.split(lengths.tolist())
        for place, part in zip(places, parts, strict=True):
            if place in own:
                part.copy_(own[place])
        self.collectives.all_reduce(flat)
        return [part.tolist() for part in parts]

    def commit(self, table: list[dict]) -> None:
        """Commits the reference stage."""
        stage = self.spec.reference
        assert stage is not None
        schema = rows.reference_schema(self.names, tokens=self.tokens, initial=bool(self.initial_names))
        full_rows = [{name: row.get(name) for name in schema.names} for row in table]
        rows.write_table(stage.start() / "reference.parquet", full_rows, schema)
        stage.commit(
            num_in=len(self.pairs), num_rows=len(table), policy=self.spec.training.reference, model=self.spec.reference_hash
        )
