"""What a run starts from: models, template, prompts and given pairs, all checked before an engine starts."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from evolve_ray import models, prompts, rows
from evolve_ray.config import Config, Preferences, flatten, from_json, resolved, texts_in_view, trainings
from evolve_ray.errors import IntegrityError, StalledError, UserError
from evolve_ray.refine import Template, find_plug, load_template
from evolve_ray.scorers import VERIFIERS, build_verifier, reward_model_names
from evolve_ray.shards import Pools
from evolve_ray.store import Manifest, Run, Stage, blocks, sha256_file, write_atomic
from evolve_ray.toy.parts import toy_parts
from evolve_ray.trackers import Trackers


@dataclass(frozen=True)
class Policy:
    """A model folder and the hash of its content."""

    folder: Path
    hash: str

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> "Policy":
        return cls(manifest.folder, models.content_hash(manifest.folder))


@dataclass
class Context:
    """A run with its checked inputs, and the few things that every stage does the same way."""

    config: Config
    run: Run
    say: Callable[[str], None]
    start_ray: Callable[[], None]
    rerun_changed: bool
    template: Template
    policy: Policy
    reward_models: dict[str, Policy] = field(default_factory=dict)  # by their names in the recipe
    initial: Policy | None = None  # what iteration 1 started from
    prompts: dict[int, Manifest] = field(default_factory=dict)
    given: dict[str, Manifest] = field(default_factory=dict)
    held_out: Manifest | None = None
    pools: Pools = field(default_factory=Pools)
    trackers: Trackers = field(default_factory=Trackers)
    told: str = ""  # the stage that was said last: one with two parts is said once

    def stage(self, final: Path, name: str, key: dict, inputs: dict[str, str]) -> Stage:
        """The stage at `final` for these inputs; with --rerun-changed, what stands there for others is put aside."""
        stage = Stage(final, name, rows.digest([name, key, inputs]), inputs)
        if self.rerun_changed and stage.superseded():
            aside = stage.put_aside()
            self.say(f"  {final.relative_to(self.run.root)}: its options or inputs changed; the old one is at {aside.name}")
            self.run.event("superseded", folder=str(final), aside=aside.name)
        return stage

    @contextlib.contextmanager
    def timed(self, stage: str, iteration: int | None) -> Iterator[None]:
        line = f"  {stage}" if iteration is None else f"  iteration {iteration}: {stage}"
        if line != self.told:
            self.say(line)
        self.told = line
        with self.run.timed(stage, iteration):
            yield

    @contextlib.contextmanager
    def followed(self, kind: str, line: Callable[[dict], str]) -> Iterator[None]:
        """Prints the events of `kind` that other processes append meanwhile."""
        done = threading.Event()

        def follow(file: Any) -> None:
            while not done.wait(1.0):
                while raw := file.readline():
                    if not raw.endswith(b"\n"):  # a line that is still being written
                        file.seek(-len(raw), os.SEEK_CUR)
                        break
                    event = json.loads(raw)
                    if event["event"] == kind:
                        self.say(line(event))

        with open(self.run.root / "events.jsonl", "rb") as file:
            file.seek(0, os.SEEK_END)
            thread = threading.Thread(target=follow, args=(file,), daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()

    @contextlib.contextmanager
    def deadline(self, name: str, stall_s: float, stage: Stage) -> Iterator[None]:
        """Ends a stage of the main thread that appends no event and stores no step for `stall_s`, wherever it waits."""
        events, steps = self.run.root / "events.jsonl", stage.work / "steps"
        seen: Any = None
        idle, last, tick = 0.0, time.monotonic(), min(5.0, stall_s / 4)

        def look(*_: Any) -> None:
            nonlocal seen, idle, last
            passed = time.monotonic() - last
            last += passed
            idle += min(passed, 2 * tick)  # a driver that was stopped itself has seen nothing
            now = (events.stat().st_size, sorted(steps.glob("*")), sorted(stage.final.parent.iterdir()))
            if now != seen:
                seen, idle = now, 0.0
            elif idle > stall_s:
                raise StalledError(
                    f"{name}: made no progress for {stall_s:g} s; see its workers' logs in the Ray dashboard, allow it more time "
                    "with trainer.stall_s, or submit the same command again: it continues from the last stored step"
                )

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, tick, tick)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def collect_rejected(self, iteration: int) -> None:
        """rejected.jsonl of an iteration: what each of its stages rejected, in the order of the data."""
        folder = self.run.iteration(iteration)
        folder.mkdir(parents=True, exist_ok=True)  # iteration 0 has no stage without held-out prompts and given pairs
        order = ("held_out", "base_evaluation", "activation_pairs", "offline_pairs", "prompts", "generations", "scores", "pairs")
        parts = [folder / name / "rejected.jsonl" for name in (*order, "evaluation")]
        write_atomic(folder / "rejected.jsonl", (block for part in parts if part.exists() for block in blocks(part)))


def settle_config(config: Config, run: Run, *, rerun_changed: bool) -> None:
    """Stores the resolved configuration; a run directory of another configuration is refused by the names of the fields."""
    path = run.root / "config.json"
    if path.exists():
        try:
            stored = json.loads(path.read_bytes())
        except ValueError:
            raise IntegrityError(f"{path}: is damaged; delete it and submit again: the stages know their own options") from None
        before = flatten(resolved(from_json(stored, str(path)), runtime=False))
        here = flatten(resolved(config, runtime=False))
        changed = sorted(name for name in before.keys() | here.keys() if before.get(name, "unset") != here.get(name, "unset"))
        if changed and not rerun_changed:
            shown = ", ".join(f"{name} ({before.get(name, 'unset')} -> {here.get(name, 'unset')})" for name in changed[:8])
            raise UserError(
                f"{run.root}: belongs to another configuration; changed: {shown}; use another --run, or submit with "
                "--rerun-changed to compute again what depends on them"
            )
    write_atomic(path, json.dumps(resolved(config), indent=1, ensure_ascii=False).encode())


def prepare(
    config: Config, run: Run, say: Callable[[str], None], start_ray: Callable[[], None], *, rerun_changed: bool
) -> Context:
    """Checks and commits everything that a run starts from; a fault in any input is raised here, before Ray starts."""
    context, toy = begin(config, run, say, start_ray, rerun_changed=rerun_changed)
    Prompter(context, toy).commit_all()
    return context


def begin(
    config: Config, run: Run, say: Callable[[str], None], start_ray: Callable[[], None], *, rerun_changed: bool,
    model: str | None = None,
) -> tuple[Context, dict[str, str]]:  # fmt: skip
    """A context with everything but prompts, and the tiny world's parts by name; `model` in place of `model.path`."""
    check_plugs(config)
    template = load_template(config.template.name, config.template.layout, config.strategy.name)
    toy = toy_parts(config, run, say) if config.toy else {}
    folder = models.resolve(model or toy.get(config.model.path, config.model.path), "model.path")
    models.check_policy(folder, config.model.context_tokens)
    context = Context(config, run, say, start_ray, rerun_changed, template, Policy(folder, models.content_hash(folder)))
    for name in reward_model_names(config.scorer):
        field_name = "scorer.members" if config.scorer.members else "scorer.model"
        folder = models.resolve(toy.get(name, name), field_name)
        models.check_reward_model(folder)
        context.reward_models[name] = Policy(folder, models.content_hash(folder))
    return context, toy


def check_plugs(config: Config) -> None:
    """Every `module:Name` of the recipe can be loaded, and the verifier has what it needs."""
    named = [("strategy.name", config.strategy.name), ("engine.name", config.engine.name), ("scorer.name", config.scorer.name)]
    named += [("selection.name", config.selection.name), ("controller.name", config.controller.name)]
    named += [(f"{name}.objective", training.objective) for name, training in trainings(config)]
    named += [("verifier.name", config.verifier.name)] if config.verifier else []
    named += [("scorer.members", member) for member in config.scorer.members if not member.startswith("reward_model=")]
    for field_name, name in named:
        if ":" in name:
            find_plug({}, name, field_name)
    if config.verifier and config.verifier.name in VERIFIERS:
        build_verifier(config.verifier)
    if config.trainer.lora_rank and importlib.util.find_spec("peft") is None:
        raise UserError(
            "trainer.lora_rank: needs the package peft; pip install -e '.[lora]', or leave it out to train all weights"
        )


class Prompter:
    """Commits the prompts of every iteration, the held-out prompts and the given triples; reads sources only if it must."""

    def __init__(self, context: Context, toy: dict[str, str]):
        self.context, self.toy, self.config = context, toy, context.config
        self._chat: Any = None
        self._limit: int | None = None

    def commit_all(self) -> None:
        """Commits everything, or names the faults of all files in one sentence each."""
        context, config = self.context, self.config
        faults: list[str] = []

        def attempt(read: Callable[..., Any], *given: Any) -> Any:
            try:
                return read(*given)
            except UserError as error:
                faults.append(str(error))

        if config.evaluation.splits:
            context.held_out = attempt(self.held_out)
        for name in ("activation", "offline"):
            part = getattr(config, name)
            if part:
                context.given[name] = attempt(self.triples, name, part)
        # Without the held-out prompts nobody knows which ones to train on: then they are only looked at.
        attempt(self.training) if not faults else attempt(self.read_training, config.prompts)
        if faults:
            raise UserError("; and ".join(dict.fromkeys(faults)))

    def source_key(self, path: str) -> list[str]:
        """A file by its content, anything else by its name."""
        path = self.toy.get(path, path)
        return ["file", sha256_file(Path(path))] if Path(path).is_file() else ["name", path]

    def count(self, prompt: str) -> int:
        return len(self.chat.context_ids(self.context.template.direct(prompt)))

    @property
    def chat(self) -> Any:
        if self._chat is None:
            from evolve_ray.chat import Chat

            self._chat = Chat(self.context.policy.folder)
            chats = [("model.path", self.context.policy, self._chat)]
            for name, model in self.context.reward_models.items():
                chats.append((f"reward model {name}", model, Chat(model.folder, f"reward model {name}")))
            for field_name, model, chat in chats:
                models.check_vocabulary(model.folder, field_name, chat.tokenizer.get_vocab())
        return self._chat

    def limit(self) -> int:
        """Tokens that a first ask may have, so that the longest context of the strategy still fits."""
        config, template = self.config, self.context.template
        widest = {
            "few_shot": template.after_several("", [""] * config.strategy.shots),
            "critique": template.revision("", "", ""),
        }.get(config.strategy.name, template.refinement("", ""))
        room = config.model.context_tokens - texts_in_view(config.strategy) * config.sampling.max_tokens
        return room - len(self.chat.context_ids(widest))

    def fitting(self, table: list[dict]) -> tuple[list[dict], list[dict]]:
        """(rows that fit the context, with their tokens; rejected ones)."""
        self._limit = self.limit() if self._limit is None else self._limit
        field = "model.context_tokens - the responses in view * sampling.max_tokens - the template"
        return prompts.with_token_counts(table, self.count, self._limit, field=field)

    def check_loss(self, too_long: list[dict], num_rows: int, path: str) -> None:
        """More than the allowed fraction of prompts too long is the user's to decide."""
        if len(too_long) > self.config.prompts.max_rejected_fraction * num_rows:
            shown = "; ".join(f"{row['file']}:{row['line']}: {row['reason']}" for row in too_long[: prompts.MAX_SHOWN])
            raise UserError(
                f"{path}: {len(too_long)} of {num_rows} prompts are too long: {shown}; raise model.context_tokens, lower "
                "sampling.max_tokens, or allow the loss with prompts.max_rejected_fraction"
            )

    def commit(self, stage: Stage, table: Any, rejected: list[dict], name: str, schema: Any, num_in: int) -> Manifest:
        """Prompts stand in row groups, so that who works on a shard reads a part of them alone."""
        rows.write_table(stage.start() / name, table, schema, group_rows=prompts.BLOCK_ROWS if schema == rows.PROMPT else None)
        return stage.commit(rejected, num_in=num_in, num_rows=len(table))

    def held_out(self, final: Path | None = None) -> Manifest:
        """The prompts of every evaluation split, committed at `final` (iteration 0's held_out/)."""
        part = self.config.evaluation
        read = (
            "splits",
            "prompt_column",
            "answer_column",
            "answer_pattern",
            "split",
            "limit",
        )  # how they are answered is the evaluation's key
        key = {
            "options": {name: getattr(part, name) for name in read},
            "tokens": self.tokens_key(),
            "sources": [self.source_key(p) for p in part.splits.values()],
        }
        stage = self.context.stage(final or self.context.run.iteration(0) / "held_out", "prompts", key, {})
        manifest = stage.committed()
        if manifest:
            return manifest
        table, rejected, num_in = [], [], 0
        for split, path in part.splits.items():
            found, duplicates = prompts.read_prompts(
                self.toy.get(path, path), prompt_column=part.prompt_column, answer_column=part.answer_column,
                answer_pattern=part.answer_pattern, source_split=part.split, split=split,
            )  # fmt: skip
            num_in += len(found) + len(duplicates)
            beyond = found[part.limit :] if part.limit else []
            rejected += duplicates + [rows.reject(row, "held_out", f"beyond evaluation.limit {part.limit}") for row in beyond]
            kept, too_long = self.fitting(found[: part.limit or None])
            self.check_loss(too_long, len(kept) + len(too_long), path)
            rejected += too_long
            table += [{**row, "prompt_id": evaluation_id(split, row["prompt_id"])} for row in kept]
        return self.commit(stage, table, rejected, "prompts.parquet", rows.PROMPT, num_in)

    def triples(self, name: str, part: Preferences) -> Manifest:
        columns = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name not in ("path", "training")}
        key = {"options": columns, "source": self.source_key(part.path)}
        stage = self.context.stage(self.context.run.iteration(0) / f"{name}_pairs", "pairs", key, {})
        manifest = stage.committed()
        if manifest:
            return manifest
        found, rejected = prompts.read_triples(
            self.toy.get(part.path, part.path), prompt_column=part.prompt_column, chosen_column=part.chosen_column,
            rejected_column=part.rejected_column, source_split=part.split, limit=part.limit,
        )  # fmt: skip
        return self.commit(stage, found, rejected, "pairs.parquet", rows.PAIR, len(found) + len(rejected))

    def tokens_key(self) -> list[Any]:
        """What decides which prompts fit: tokenizer and template through the hashes, and the sizes."""
        config = self.config
        texts = texts_in_view(config.strategy)
        sizes = [config.model.context_tokens, config.sampling.max_tokens, texts]
        return [self.context.policy.hash, self.context.template.hash, *sizes]

    def training(self) -> None:
        """The fresh prompts of every iteration; those that are also evaluation prompts are left out and counted."""
        context, part = self.context, self.config.prompts
        common = {
            "options": {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name != "path"},
            "tokens": self.tokens_key(),
            "source": self.source_key(part.path),
            "seed": self.config.seed,
        }
        inputs = {"held_out": context.held_out.identity} if context.held_out else {}
        stages = {
            number: context.stage(context.run.iteration(number) / "prompts", "prompts", {**common, "iteration": number}, inputs)
            for number in range(1, self.config.iterations + 1)
        }
        found = {number: stage.committed() for number, stage in stages.items()}
        if not all(found.values()):
            table, rejected = self.read_training(part)
            needed = part.per_iteration * self.config.iterations
            if len(table) < needed:
                raise UserError(
                    f"{part.path}: {self.config.iterations} iterations of {part.per_iteration} fresh prompts need {needed}, but "
                    f"{len(table)} are usable; lower prompts.per_iteration or iterations, or give more prompts"
                )
            order = prompts.fresh_order(table["prompt_id"], seed=self.config.seed)
            for number, stage in stages.items():
                if found[number] is None:
                    fresh = prompts.fresh_slice(table, order, iteration=number, per_iteration=part.per_iteration)
                    lost = rejected if number == 1 else []
                    found[number] = self.commit(stage, fresh, lost, "prompts.parquet", rows.PROMPT, len(fresh) + len(lost))
        context.prompts = {number: manifest for number, manifest in found.items() if manifest}

    def read_training(self, part: Any) -> tuple[pa.Table, list[dict]]:
        """Usable training prompts as one table, which takes a fraction of the memory of as many dicts, and the rejected rows."""
        held = self.context.held_out
        texts = {row["prompt"]: row["split"] for row in rows.read_table(held.path("prompts.parquet"))} if held else {}
        duplicates: list[dict] = []
        overlap: list[dict] = []
        too_long: list[dict] = []
        blocks_of: list[pa.Table] = []
        scanned = prompts.scan_prompts(
            self.toy.get(part.path, part.path), duplicates, prompt_column=part.prompt_column, answer_column=part.answer_column,
            answer_pattern=part.answer_pattern, id_column=part.id_column, source_split=part.split,
        )  # fmt: skip
        while block := list(itertools.islice(scanned, prompts.BLOCK_ROWS)):
            kept, held_here = prompts.drop_held_out(block, texts)
            kept, long_here = self.fitting(kept)
            overlap += held_here
            too_long += long_here
            blocks_of.append(pa.Table.from_pylist(kept, schema=rows.PROMPT))
        table = pa.concat_tables(blocks_of).combine_chunks()
        self.check_loss(too_long, len(table) + len(too_long), part.path)
        return table, duplicates + overlap + too_long


def evaluation_id(split: str, prompt_id: str) -> str:
    """The id of a held-out prompt: one file may be two splits."""
    return rows.content_id("evaluation", split, prompt_id)
