"""Commits the prompts of all iterations, the held-out prompts and the preference triples, or names the faults of all files."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from evolve_ray.config.options import Config, Preferences, Prompts, texts_in_view
from evolve_ray.config.resolve import resolved
from evolve_ray.data.prompts import HeldOut, fresh_order, fresh_slice, order_again
from evolve_ray.data.read import BLOCK_ROWS
from evolve_ray.errors import UserError
from evolve_ray.inputs.reader import DataReader, prompt_schema
from evolve_ray.store import rows
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage

if TYPE_CHECKING:
    from evolve_ray.inputs.context import Context

# Options of [evaluation] that decide which prompts are held out; the other options are in the key of the evaluation.
HELD_OUT = ("splits", "prompt_column", "answer_column", "answer_pattern", "split", "limit")
LATER = ("draft_column", "columns")  # those that are in the key only where they are set


class Prompter:
    """Commits the prompts of all iterations, the held-out prompts and the triples; reads a file only if its stage is missing."""

    def __init__(self, context: "Context", toy: dict[str, str]):
        self.context, self.toy, self.config = context, toy, context.config
        self.reader = DataReader(context.config, context.template, context.policy.folder, toy, context.say)

    def commit_all(self) -> None:
        """Commits everything, or raises one `UserError` with the faults of all files."""
        context, config, reader = self.context, self.config, self.reader
        faults: list[str] = []

        def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return read(*arguments)
            except UserError as error:
                faults.append(str(error))

        if config.evaluation.splits:
            context.held_out = attempt(self.held_out)
        # After a fault in the held-out prompts it is unknown which rows overlap with them, so the other files are only checked.
        for name in ("activation", "offline"):
            part = getattr(config, name)
            if part and not faults:
                context.triples[name] = attempt(self.triples, name, part)
            elif part:
                attempt(reader.triples, name, part, self.held_prompts())
        attempt(self.training) if not faults else attempt(reader.training, self.held_prompts())
        if faults:
            raise UserError("; and ".join(dict.fromkeys(faults)))

    def source_key(self, path: str) -> list[str]:
        """The part of a stage key for a source: a file by the hash of its content, anything else by its name."""
        path = self.toy.get(path, path)
        return ["file", sha256_file(Path(path))] if Path(path).is_file() else ["name", path]

    def system_key(self) -> dict[str, str]:
        """The part of a stage key for the system prompt that rows without one get."""
        return {"system": self.config.prompts.system} if self.config.prompts.system else {}

    def commit(self, stage: Stage, table: Any, rejected: list[dict], name: str, schema: Any, num_in: int) -> Manifest:
        """Commits a table; prompts are written in row groups, so that an actor reads only the part of its shard."""
        rows.write_table(stage.start() / name, table, schema, group_rows=BLOCK_ROWS if name == "prompts.parquet" else None)
        return stage.commit(rejected, num_in=num_in, num_rows=len(table))

    def held_out(self, final: Path | None = None) -> Manifest:
        """The prompts of every evaluation split, committed at `final` (iteration 0's held_out/)."""
        part = self.config.evaluation
        key = {
            "options": {name: getattr(part, name) for name in (*HELD_OUT, *(name for name in LATER if getattr(part, name)))},
            "tokens": self.tokens_key(),
            "sources": [self.source_key(p) for p in part.splits.values()],
            **self.system_key(),
        }
        stage = self.context.stage(final or self.context.run.iteration(0) / "held_out", "prompts", key, {})
        manifest = stage.committed()
        if manifest:
            return manifest
        table, rejected, num_in = self.reader.held_out()
        return self.commit(stage, table, rejected, "prompts.parquet", prompt_schema(part), num_in)

    def triples(self, name: str, part: Preferences) -> Manifest:
        """The preference triples of `[activation]` or `[offline]`, committed as pairs in iteration 0."""
        options = {key: value for key, value in resolved(part, runtime=False).items() if key not in ("path", "training")}
        key = {"options": options, "source": self.source_key(part.path), **self.system_key()}
        stage = self.context.stage(self.context.run.iteration(0) / f"{name}_pairs", "pairs", key, self.held_inputs())
        manifest = stage.committed()
        if manifest:
            return manifest
        pairs, rejected = self.reader.triples(name, part, self.held_prompts())
        return self.commit(stage, pairs, rejected, "pairs.parquet", rows.PAIR, len(pairs) + len(rejected))

    def held_inputs(self) -> dict[str, str]:
        """The stage inputs of a stage that leaves out held-out prompts; its own file is in its key."""
        return {"held_out": self.context.held_out.identity} if self.context.held_out else {}

    def held_prompts(self) -> HeldOut:
        held_out = self.context.held_out
        return HeldOut(rows.read_table(held_out.path("prompts.parquet")), self.reader.asked) if held_out else HeldOut()

    def tokens_key(self) -> list[Any]:
        """The part of a stage key that decides which prompts fit: the tokenizer and template (by hash), and the sizes."""
        config = self.config
        texts = texts_in_view(config.strategy)
        sizes = [config.model.context_tokens, config.sampling.max_tokens, texts]
        return [self.context.policy.hash, self.context.template.hash, *sizes]

    def training(self) -> None:
        """Commits the fresh prompts of every iteration; a prompt that is also held out is rejected and counted."""
        context, part = self.context, self.config.prompts
        common = {
            "options": {key: value for key, value in resolved(part, runtime=False).items() if key != "path"},
            "tokens": self.tokens_key(),
            "source": self.source_key(part.path),
            "seed": self.config.seed,
        }
        inputs = self.held_inputs()
        stages = {
            number: context.stage(context.run.iteration(number) / "prompts", "prompts", {**common, "iteration": number}, inputs)
            for number in range(1, self.config.iterations + 1)
        }
        manifests = {number: stage.committed() for number, stage in stages.items()}
        if not all(manifests.values()):
            table, rejected = self.reader.training(self.held_prompts())
            order = order_of(table, part, self.config)
            for number, stage in stages.items():
                if manifests[number] is None:
                    fresh = fresh_slice(table, order, iteration=number, per_iteration=part.per_iteration)
                    dropped = rejected if number == 1 else []
                    num_in = len(fresh) + len(dropped)
                    manifests[number] = self.commit(stage, fresh, dropped, "prompts.parquet", prompt_schema(part), num_in)
        context.prompts = {number: manifest for number, manifest in manifests.items() if manifest}


def order_of(table: pa.Table, part: Prompts, config: Config) -> pa.Array:
    """Row numbers of the usable prompts in the order in which iterations take them; raises `UserError` if they are too few."""
    needed = part.per_iteration * config.iterations
    if part.again == "when_used_up" and len(table) < part.per_iteration and needed:
        raise UserError(
            f"{part.path}: an iteration has {part.per_iteration} different prompts, but {len(table)} are usable; lower "
            "prompts.per_iteration, or add prompts"
        )
    if part.again == "never" and len(table) < needed:
        raise UserError(
            f"{part.path}: {config.iterations} iterations of {part.per_iteration} fresh prompts need {needed}, but {len(table)} "
            "are usable; lower prompts.per_iteration or iterations, add prompts, or let them come again with "
            "prompts.again = 'when_used_up'"
        )
    order = fresh_order(table["prompt_id"], seed=config.seed)
    if part.again == "never":
        return order
    return order_again(table, order, seed=config.seed, per_iteration=part.per_iteration, needed=needed)
