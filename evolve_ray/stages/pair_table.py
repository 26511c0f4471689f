"""The table of pairs, written shard by shard: columns that only some rows need are added when the first such row comes."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from evolve_ray.errors import UserError
from evolve_ray.store import rows


class PairWriter:
    """Writes pairs.parquet with a row group for each shard; the first pair decides whether there are numbers, and which.

    The bytes do not depend on the shard in which a column of `rows.TURN_DETAILS` is first needed.
    """

    def __init__(self, path: Path, schema: pa.Schema, selection: str):
        self.path, self.schema, self.selection, self.num_empty = path, schema, selection, 0
        self.writer: pq.ParquetWriter | None = None
        self.names: list[str] = []
        self.details: list[str] = []  # of rows.TURN_DETAILS

    def write(self, pairs: list[dict]) -> None:
        if not pairs and self.writer is None:
            self.num_empty += 1  # the schema is not known yet
            return
        present = {name for pair in pairs for name in rows.TURN_DETAILS.names if pair.get(name) is not None}
        details = [name for name in rows.TURN_DETAILS.names if name in present or name in self.details]
        if self.writer is None:
            self.open(sorted(pairs[0].get("numbers", {})), details)
        elif details != self.details:
            self.widen(details)
        for pair in pairs:
            if sorted(pair.get("numbers", {})) != self.names:
                raise UserError(
                    f"selection.name: {self.selection!r}, prompt {pair['prompt_id']}: has the numbers "
                    f"{', '.join(sorted(pair.get('numbers', {}))) or 'none'}, but earlier pairs have "
                    f"{', '.join(self.names) or 'none'}; every pair must have the same numbers"
                )
        self.add(pairs)

    def open(self, names: list[str], details: list[str]) -> None:
        """Starts the file, with a table for each shard so far that has no pair."""
        self.names, self.details = names, details
        schema = pa.schema([*self.schema, *(rows.TURN_DETAILS.field(name) for name in details)])
        self.writer = pq.ParquetWriter(self.path, rows.numbered(schema, names), compression="zstd")
        for _ in range(self.num_empty):
            self.add([])
        self.num_empty = 0

    def add(self, pairs: list[dict]) -> None:
        assert self.writer is not None
        self.writer.write_table(rows.to_table(pairs, self.writer.schema))

    def widen(self, details: list[str]) -> None:
        """Writes the file again with further columns, one row group in memory at a time."""
        assert self.writer is not None
        self.writer.close()
        narrow = self.path.rename(self.path.with_name(".narrow.parquet"))
        self.open(self.names, details)
        for shard in row_groups(narrow):
            self.add(shard)
        narrow.unlink()

    def close(self) -> None:
        if self.writer is None:
            self.open([], [])
        assert self.writer is not None
        self.writer.close()


def row_groups(path: Path) -> Iterator[list[dict]]:
    """Yields the pairs of each row group, which are those of a shard."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            yield rows.from_table(file.read_row_group(number))
