"""What a run starts from: models, template, prompts and given pairs, all checked before an engine starts."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve_ray import models, prompts, rows
from evolve_ray.config import Config, Preferences, flatten, from_json, resolved
from evolve_ray.errors import IntegrityError, ResourceError, UserError
from evolve_ray.refine import Template, find_plug, load_template
from evolve_ray.shards import Pools
from evolve_ray.store import Manifest, Run, Stage, sha256_file, write_atomic

TOY_VERSION = 1


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
    reward_model: Path | None = None
    reward_model_hash: str | None = None
    prompts: dict[int, Manifest] = field(default_factory=dict)
    given: dict[str, Manifest] = field(default_factory=dict)
    held_out: Manifest | None = None
    pools: Pools = field(default_factory=Pools)

    def stage(self, final: Path, name: str, key: dict, inputs: dict[str, str]) -> Stage:
        """The stage at `final` for these inputs; with --rerun-changed, what stands there for others is put aside."""
        stage = Stage(final, name, rows.digest([name, key, inputs]), inputs)
        if self.rerun_changed and stage.superseded():
            aside = stage.put_aside()
            self.say(f"  {final.relative_to(self.run.root)}: its options or inputs changed; the old one is at {aside.name}")
            self.run.event("superseded", folder=str(final), aside=aside.name)
        return stage

    @contextlib.contextmanager
    def timed(self, stage: str, iteration: int) -> Iterator[None]:
        self.say(f"  iteration {iteration}: {stage}")
        with self.run.timed(stage, iteration):
            yield

    @contextlib.contextmanager
    def followed(self, kind: str, line: Callable[[dict], str]) -> Iterator[None]:
        """Prints the events of `kind` that other processes append meanwhile."""
        done = threading.Event()

        def follow(file: Any) -> None:
            while not done.wait(1.0):
                for raw in file:
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

    def collect_rejected(self, iteration: int) -> None:
        """rejected.jsonl of an iteration: what each of its stages rejected, in the order of the data."""
        folder = self.run.iteration(iteration)
        order = ("held_out", "base_evaluation", "activation_pairs", "offline_pairs", "prompts", "generations", "scores", "pairs")
        parts = [folder / name / "rejected.jsonl" for name in (*order, "evaluation")]
        write_atomic(folder / "rejected.jsonl", b"".join(part.read_bytes() for part in parts if part.exists()))


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
    check_plugs(config)
    template = load_template(config.template.name, config.template.layout)
    toy = toy_parts(config, run, say) if config.toy else {}
    folder = models.resolve(toy.get(config.model.path, config.model.path), "model.path")
    models.check_policy(folder, config.model.context_tokens)
    context = Context(config, run, say, start_ray, rerun_changed, template, Policy(folder, models.content_hash(folder)))
    if config.scorer.name == "reward_model":
        context.reward_model = models.resolve(toy.get(config.scorer.model, config.scorer.model), "scorer.model")
        models.check_reward_model(context.reward_model)
        context.reward_model_hash = models.content_hash(context.reward_model)
    Prompter(context, toy).commit_all()
    return context


def check_plugs(config: Config) -> None:
    """Every `module:Name` of the recipe can be loaded."""
    training = [config.training, *(part.training for part in (config.activation, config.offline) if part)]
    named = [("strategy.name", config.strategy.name), ("engine.name", config.engine.name), ("scorer.name", config.scorer.name)]
    named += [("selection.name", config.selection.name), *(("training.objective", part.objective) for part in training)]
    named += [("verifier.name", config.verifier.name)] if config.verifier else []
    for field_name, name in named:
        if ":" in name:
            find_plug({}, name, field_name)


class Prompter:
    """Commits the prompts of every iteration, the held-out prompts and the given triples; reads sources only if it must."""

    def __init__(self, context: Context, toy: dict[str, str]):
        self.context, self.toy, self.config = context, toy, context.config
        self._chat: Any = None

    def commit_all(self) -> None:
        context, config = self.context, self.config
        if config.evaluation.splits:
            context.held_out = self.held_out()
        for name in ("activation", "offline"):
            part = getattr(config, name)
            if part:
                context.given[name] = self.triples(name, part)
        self.training()

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
            if self.context.reward_model:
                Chat(self.context.reward_model, "scorer.model")
        return self._chat

    def limit(self) -> int:
        """Tokens that a first ask may have, so that a refinement of a longest draft still fits into the context."""
        extra = len(self.chat.context_ids(self.context.template.refinement("", "")))
        return self.config.model.context_tokens - 2 * self.config.sampling.max_tokens - extra

    def bounded(self, table: list[dict], path: str, allowed: float) -> tuple[list[dict], list[dict]]:
        """Rows that fit the context; more than `allowed` of them too long is the user's to decide."""
        limit = self.limit()
        kept, rejected = prompts.with_token_counts(
            table, self.count, limit, field="model.context_tokens - 2 * sampling.max_tokens - the template"
        )
        if len(rejected) > allowed * len(table):
            shown = "; ".join(f"{row['file']}:{row['line']}: {row['reason']}" for row in rejected[: prompts.MAX_SHOWN])
            raise UserError(
                f"{path}: {len(rejected)} of {len(table)} prompts are too long: {shown}; raise model.context_tokens, lower "
                "sampling.max_tokens, or allow the loss with prompts.max_rejected_fraction"
            )
        return kept, rejected

    def commit(self, stage: Stage, table: list[dict], rejected: list[dict], name: str, schema: Any, num_in: int) -> Manifest:
        rows.write_table(stage.start() / name, table, schema)
        return stage.commit(rejected, num_in=num_in, num_rows=len(table))

    def held_out(self) -> Manifest:
        config, part = self.config, self.config.evaluation
        key = {
            "options": resolved(part),
            "tokens": self.tokens_key(),
            "sources": [self.source_key(p) for p in part.splits.values()],
        }
        stage = self.context.stage(self.context.run.iteration(0) / "held_out", "prompts", key, {})
        manifest = stage.committed()
        if manifest:
            return manifest
        table, rejected, num_in = [], [], 0
        for split, path in part.splits.items():
            found, duplicates = prompts.read_prompts(
                self.toy.get(path, path), prompt_column=part.prompt_column, answer_column=part.answer_column,
                source_split=part.split, split=split,
            )  # fmt: skip
            num_in += len(found) + len(duplicates)
            beyond = found[part.limit :] if part.limit else []
            rejected += duplicates + [rows.reject(row, "held_out", f"beyond evaluation.limit {part.limit}") for row in beyond]
            kept, too_long = self.bounded(found[: part.limit or None], path, config.prompts.max_rejected_fraction)
            rejected += too_long
            table += [{**row, "prompt_id": rows.content_id("evaluation", split, row["prompt_id"])} for row in kept]
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
        return [self.context.policy.hash, self.context.template.hash, config.model.context_tokens, config.sampling.max_tokens]

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
            for number, stage in stages.items():
                if found[number] is None:
                    fresh = prompts.fresh_slice(table, seed=self.config.seed, iteration=number, per_iteration=part.per_iteration)
                    lost = rejected if number == 1 else []
                    found[number] = self.commit(stage, fresh, lost, "prompts.parquet", rows.PROMPT, len(fresh) + len(lost))
        context.prompts = {number: manifest for number, manifest in found.items() if manifest}

    def read_training(self, part: Any) -> tuple[list[dict], list[dict]]:
        table, duplicates = prompts.read_prompts(
            self.toy.get(part.path, part.path), prompt_column=part.prompt_column, answer_column=part.answer_column,
            id_column=part.id_column, source_split=part.split,
        )  # fmt: skip
        held = self.context.held_out
        texts = {row["prompt"]: row["split"] for row in rows.read_table(held.path("prompts.parquet"))} if held else {}
        table, overlap = prompts.drop_held_out(table, texts)
        table, too_long = self.bounded(table, part.path, part.max_rejected_fraction)
        return table, duplicates + overlap + too_long


def toy_parts(config: Config, run: Run, say: Callable[[str], None]) -> dict[str, str]:
    """Paths of the tiny world's parts by their `toy:` names; made once and kept beside the run, by content hash."""
    assert config.toy is not None
    world = resolved(config.toy)
    steps = world.pop("reward_model_steps")
    folder = make_toy(run, "world", world, say)
    parts = {f"toy:{name}": str(folder / f"{name}.jsonl") for name in ("train", "heldout", "long", "desc", "triples")}
    parts["toy:base"] = str(folder / "base")
    if config.scorer.model == "toy:reward_model":
        options = {**world, "reward_model_steps": steps, "base": parts["toy:base"]}
        key = {**options, "base": models.content_hash(folder / "base")}
        parts["toy:reward_model"] = str(make_toy(run, "reward_model", options, say, key) / "reward_model")
    named = [config.model.path, config.prompts.path, config.scorer.model, *config.evaluation.splits.values()]
    named += [part.path for part in (config.activation, config.offline) if part]
    for name in named:
        if name.startswith("toy:") and name not in parts:
            raise UserError(f"{name}: the tiny world has no such part; it has {', '.join(sorted(parts))}")
    return parts


def make_toy(run: Run, part: str, options: dict, say: Callable[[str], None], key: dict | None = None) -> Path:
    """One committed folder of the tiny world, made in a process of its own."""
    digest = rows.digest(["toy", TOY_VERSION, part, key or options])
    stage = Stage(run.root.parent / f"toy-{part.replace('_', '-')}-{digest[:12]}", f"toy {part}", digest)
    stage.work = stage.work.with_name(f"{stage.work.name}-{os.getpid()}")  # two runs may make the same world at once
    manifest = stage.committed()
    if manifest is None:
        say(f"  tiny world: making its {part.replace('_', ' ')} (kept at {stage.final})")
        code = str(Path(__file__).parents[1])
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, "-m", "evolve_ray.toy", part, str(stage.start()), json.dumps(options)]
        result = subprocess.run(command, env=environment)
        if result.returncode:
            raise ResourceError(f"tiny world: its {part} could not be made (exit {result.returncode}); see the lines above")
        manifest = stage.commit()
    return manifest.folder
