"""Commits the prompts of all iterations, the held-out prompts and the preference triples, or names the faults of all files."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from evolve_ray.config.options import Preferences, texts_in_view
from evolve_ray.data import triples as data_triples
from evolve_ray.data.prompts import (
    HeldOut,
    drop_held_out,
    drop_repeated,
    fresh_order,
    fresh_slice,
    read_prompts,
    scan_prompts,
    with_token_counts,
)
from evolve_ray.data.read import BLOCK_ROWS, MAX_SHOWN
from evolve_ray.errors import UserError
from evolve_ray.models.same_tokens import SameTokens
from evolve_ray.score.verifiers import gold_check
from evolve_ray.store import rows
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage

if TYPE_CHECKING:
    from evolve_ray.inputs.context import Context

# Options of [evaluation] that decide which prompts are held out; the other options are in the key of the evaluation.
HELD_OUT = ("splits", "prompt_column", "answer_column", "answer_pattern", "split", "limit")


class Prompter:
    """Commits the prompts of all iterations, the held-out prompts and the triples; reads a file only if its stage is missing."""

    def __init__(self, context: "Context", toy: dict[str, str]):
        self.context, self.toy, self.config = context, toy, context.config
        self._chat: Any = None
        self._limit: int | None = None
        # The tokens of a prompt are asked for up to three times, while its block is read.
        self.first_ask = functools.lru_cache(maxsize=BLOCK_ROWS)(self.read_first_ask)

    def commit_all(self) -> None:
        """Commits everything, or raises one `UserError` with the faults of all files."""
        context, config = self.context, self.config
        faults: list[str] = []

        def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return read(*arguments)
            except UserError as error:
                faults.append(str(error))

        if config.evaluation.splits:
            context.held_out = attempt(self.held_out)
        for name in ("activation", "offline"):
            part = getattr(config, name)
            if part:
                # A fault in the held-out prompts: the rows that overlap with them are unknown, so the file is only checked.
                context.triples[name] = attempt(self.triples, name, part) if not faults else attempt(self.read_triples, part)
        attempt(self.training) if not faults else attempt(self.read_training, config.prompts)
        if faults:
            raise UserError("; and ".join(dict.fromkeys(faults)))

    def source_key(self, path: str) -> list[str]:
        """The part of a stage key for a source: a file by the hash of its content, anything else by its name."""
        path = self.toy.get(path, path)
        return ["file", sha256_file(Path(path))] if Path(path).is_file() else ["name", path]

    def read_first_ask(self, prompt: str) -> tuple[int, str]:
        """(number of tokens of a prompt's first ask, an id of these tokens)."""
        ids = self.chat.context_ids(self.context.template.direct(prompt))
        return len(ids), rows.content_id("ask", ids)

    def count(self, prompt: str) -> int:
        return self.first_ask(prompt)[0]

    def asked(self, prompt: str) -> str:
        return self.first_ask(prompt)[1]

    @functools.cached_property
    def gold_fault(self) -> Callable[[str], str] | None:
        """What is wrong with a gold answer, if the verifier can say it."""
        return gold_check(self.config.verifier)

    @property
    def chat(self) -> Any:
        if self._chat is None:
            from evolve_ray.models.chat import Chat

            self._chat = Chat(self.context.policy.folder, rendering=self.context.template.rendering)
        return self._chat

    def limit(self) -> int:
        """The most tokens that a first ask may have, so that the longest context of the strategy still fits."""
        config, template = self.config, self.context.template
        longest_ask = {
            "few_shot": template.after_several("", [""] * config.strategy.shots),
            "critique": template.revision("", "", ""),
        }.get(config.strategy.name, template.refinement("", ""))
        room = config.model.context_tokens - texts_in_view(config.strategy) * config.sampling.max_tokens
        return room - len(self.chat.context_ids(longest_ask))

    def fitting(self, table: list[dict]) -> tuple[list[dict], list[dict]]:
        """(rows that fit the context, with their `num_tokens`; rejected rows)."""
        self._limit = self.limit() if self._limit is None else self._limit
        field = "model.context_tokens - the responses in view * sampling.max_tokens - the template"
        return with_token_counts(table, self.count, self._limit, field=field)

    def check_loss(self, too_long: list[dict], num_rows: int, path: str) -> None:
        """Raises `UserError` if more than `prompts.max_rejected_fraction` of the prompts are too long."""
        if len(too_long) > self.config.prompts.max_rejected_fraction * num_rows:
            shown = "; ".join(f"{row['file']}:{row['line']}: {row['reason']}" for row in too_long[:MAX_SHOWN])
            raise UserError(
                f"{path}: {len(too_long)} of {num_rows} prompts are too long: {shown}; raise model.context_tokens, lower "
                "sampling.max_tokens, or allow the loss with prompts.max_rejected_fraction"
            )

    def commit(self, stage: Stage, table: Any, rejected: list[dict], name: str, schema: Any, num_in: int) -> Manifest:
        """Commits a table; prompts are written in row groups, so that an actor reads only the part of its shard."""
        rows.write_table(stage.start() / name, table, schema, group_rows=BLOCK_ROWS if schema == rows.PROMPT else None)
        return stage.commit(rejected, num_in=num_in, num_rows=len(table))

    def held_out(self, final: Path | None = None) -> Manifest:
        """The prompts of every evaluation split, committed at `final` (iteration 0's held_out/)."""
        part = self.config.evaluation
        key = {
            "options": {name: getattr(part, name) for name in HELD_OUT},
            "tokens": self.tokens_key(),
            "sources": [self.source_key(p) for p in part.splits.values()],
        }
        stage = self.context.stage(final or self.context.run.iteration(0) / "held_out", "prompts", key, {})
        manifest = stage.committed()
        if manifest:
            return manifest
        table, rejected, num_in = [], [], 0
        for split, path in part.splits.items():
            prompts, duplicates = read_prompts(
                self.toy.get(path, path), prompt_column=part.prompt_column, answer_column=part.answer_column,
                answer_pattern=part.answer_pattern, source_split=part.split, split=split, gold_fault=self.gold_fault,
            )  # fmt: skip
            num_in += len(prompts) + len(duplicates)
            beyond = prompts[part.limit :] if part.limit else []
            rejected += duplicates + [rows.reject(row, "held_out", f"beyond evaluation.limit {part.limit}") for row in beyond]
            usable, repeated = drop_repeated(prompts[: part.limit or None], self.asked, {})
            fitting, too_long = self.fitting(usable)
            self.check_loss(too_long, len(fitting) + len(too_long), path)
            rejected += repeated + too_long
            table += [{**row, "prompt_id": evaluation_id(split, row["prompt_id"])} for row in fitting]
        return self.commit(stage, table, rejected, "prompts.parquet", rows.PROMPT, num_in)

    def triples(self, name: str, part: Preferences) -> Manifest:
        """The preference triples of `[activation]` or `[offline]`, committed as pairs in iteration 0."""
        options = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name not in ("path", "training")}
        key = {"options": options, "source": self.source_key(part.path)}
        stage = self.context.stage(self.context.run.iteration(0) / f"{name}_pairs", "pairs", key, self.held_inputs())
        manifest = stage.committed()
        if manifest:
            return manifest
        pairs, rejected = self.read_triples(part)
        return self.commit(stage, pairs, rejected, "pairs.parquet", rows.PAIR, len(pairs) + len(rejected))

    def read_triples(self, part: Preferences) -> tuple[list[dict], list[dict]]:
        return data_triples.read_triples(
            self.toy.get(part.path, part.path), prompt_column=part.prompt_column, chosen_column=part.chosen_column,
            rejected_column=part.rejected_column, source_split=part.split, limit=part.limit, held_out=self.held_prompts(),
            same_tokens=None if part.training.objective == "sft" else self.same_tokens,
        )  # fmt: skip

    @property
    def same_tokens(self) -> SameTokens:
        return SameTokens(self.context.policy.folder, self.context.template.rendering)

    def held_inputs(self) -> dict[str, str]:
        """The stage inputs of a stage that leaves out held-out prompts; its own file is in its key."""
        return {"held_out": self.context.held_out.identity} if self.context.held_out else {}

    def held_prompts(self) -> HeldOut:
        held_out = self.context.held_out
        return HeldOut(rows.read_table(held_out.path("prompts.parquet")), self.asked) if held_out else HeldOut()

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
            "options": {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name != "path"},
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
            table, rejected = self.read_training(part)
            needed = part.per_iteration * self.config.iterations
            if len(table) < needed:
                raise UserError(
                    f"{part.path}: {self.config.iterations} iterations of {part.per_iteration} fresh prompts need {needed}, but "
                    f"{len(table)} are usable; lower prompts.per_iteration or iterations, or add prompts"
                )
            order = fresh_order(table["prompt_id"], seed=self.config.seed)
            for number, stage in stages.items():
                if manifests[number] is None:
                    fresh = fresh_slice(table, order, iteration=number, per_iteration=part.per_iteration)
                    dropped = rejected if number == 1 else []
                    num_in = len(fresh) + len(dropped)
                    manifests[number] = self.commit(stage, fresh, dropped, "prompts.parquet", rows.PROMPT, num_in)
        context.prompts = {number: manifest for number, manifest in manifests.items() if manifest}

    def read_training(self, part: Any) -> tuple[pa.Table, list[dict]]:
        """(the usable training prompts as one table, which needs far less memory than dicts; the rejected rows)."""
        held_prompts = self.held_prompts()
        line_of: dict[tuple[str, str | None], int] = {}
        duplicates: list[dict] = []
        overlap: list[dict] = []
        too_long: list[dict] = []
        tables: list[pa.Table] = []
        prompts = scan_prompts(
            self.toy.get(part.path, part.path), duplicates, prompt_column=part.prompt_column, answer_column=part.answer_column,
            answer_pattern=part.answer_pattern, id_column=part.id_column, source_split=part.split, gold_fault=self.gold_fault,
        )  # fmt: skip
        while block := list(itertools.islice(prompts, BLOCK_ROWS)):
            usable, held_out = drop_held_out(block, held_prompts)
            # Ids of the user's own say which prompts differ.
            usable, repeated = (usable, []) if part.id_column else drop_repeated(usable, self.asked, line_of)
            usable, beyond = self.fitting(usable)
            overlap += held_out + repeated
            too_long += beyond
            tables.append(pa.Table.from_pylist(usable, schema=rows.PROMPT))
        table = pa.concat_tables(tables).combine_chunks()
        self.check_loss(too_long, len(table) + len(too_long), part.path)
        return table, duplicates + overlap + too_long


def evaluation_id(split: str, prompt_id: str) -> str:
    """The id of a held-out prompt; it contains the split, since two splits may read the same file."""
    return rows.content_id("evaluation", split, prompt_id)
