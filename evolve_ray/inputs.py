"""What a run starts from: models, template, prompts and given pairs, all checked before an engine starts."""

import contextlib
import importlib.util
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve_ray.config.load import from_json
from evolve_ray.config.options import Config, trainings
from evolve_ray.config.plugs import find_plug
from evolve_ray.config.resolve import flatten, resolved
from evolve_ray.errors import IntegrityError, StalledError, UserError
from evolve_ray.models import folders
from evolve_ray.pools.actors import Pools
from evolve_ray.prompter import Prompter
from evolve_ray.refine.template import Template, load_template
from evolve_ray.scorers import VERIFIERS, build_verifier, reward_model_field, reward_model_names
from evolve_ray.store import rows
from evolve_ray.store.files import blocks, write_atomic
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Run, Stage
from evolve_ray.toy.parts import toy_parts
from evolve_ray.trackers import Trackers


@dataclass(frozen=True)
class Policy:
    """A model folder and the hash of its content."""

    folder: Path
    hash: str

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> "Policy":
        return cls(manifest.folder, folders.content_hash(manifest.folder))


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
    changed: str = ""  # the options of the recipe in which this run differs from what it was before
    told: str = ""  # the stage that was said last: one with two parts is said once

    def stage(self, final: Path, name: str, key: dict, inputs: dict[str, str]) -> Stage:
        """The stage at `final` for these inputs; with --rerun-changed, what stands there for others is put aside."""
        stage = Stage(final, name, rows.digest([name, key, inputs]), inputs)
        old = stage.superseded() if self.rerun_changed else None
        if old:
            why, aside = self.why_again(old.inputs, inputs), stage.put_aside()
            self.say(f"  {final.relative_to(self.run.root)}: {why}; the old one is at {aside.name}")
            self.run.event("superseded", folder=str(final), aside=aside.name, why=why)
        return stage

    def why_again(self, before: dict[str, str], now: dict[str, str]) -> str:
        """Why a stage is computed again: what it is made from is other than before, or it is its own options or source."""
        others = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        why = f"is made from other {' and '.join(others)} now" if others else "its options or its source changed"
        return f"{why} (in the recipe: {self.changed})" if self.changed else why

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
    def deadline(self, name: str, stall_s: float, progress: Callable[[], Any], advice: str) -> Iterator[None]:
        """Ends a stage of the main thread that for `stall_s` appends no event and changes no `progress`, wherever it waits.

        Where Ray waits, it heeds a KeyboardInterrupt of a handler and drops every other error.
        """
        events = self.run.root / "events.jsonl"
        seen: Any = None
        stalled: list[StalledError] = []
        idle, last, tick = 0.0, time.monotonic(), min(5.0, stall_s / 4)

        def look(*_: Any) -> None:
            nonlocal seen, idle, last
            passed = time.monotonic() - last
            last += passed
            idle += min(passed, 2 * tick)  # a driver that was stopped itself has seen nothing
            now = (events.stat().st_size, progress())
            if now != seen:
                seen, idle = now, 0.0
            elif idle > stall_s:
                stalled.append(StalledError(f"{name}: made no progress for {stall_s:g} s; {advice}"))
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, tick, tick)
        try:
            yield
        except KeyboardInterrupt:
            if stalled:
                raise stalled[0] from None
            raise
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


def settle_config(config: Config, run: Run, *, rerun_changed: bool) -> str:
    """Stores the resolved configuration; a run directory of another configuration is refused by the names of the fields.

    With `rerun_changed` these are returned, with their values before and now.
    """
    path, shown = run.root / "config.json", ""
    if path.exists():
        try:
            stored = json.loads(path.read_bytes())
        except ValueError:
            raise IntegrityError(f"{path}: is damaged; delete it and submit again: the stages know their own options") from None
        before = flatten(resolved(from_json(stored, str(path)), runtime=False))
        here = flatten(resolved(config, runtime=False))
        changed = sorted(name for name in before.keys() | here.keys() if before.get(name, "unset") != here.get(name, "unset"))
        shown = ", ".join(f"{name} ({before.get(name, 'unset')} -> {here.get(name, 'unset')})" for name in changed[:8])
        if changed and not rerun_changed:
            raise UserError(
                f"{run.root}: belongs to another configuration; changed: {shown}; use another --run, or submit with "
                "--rerun-changed to compute again what depends on them"
            )
    write_atomic(path, json.dumps(resolved(config), indent=1, ensure_ascii=False).encode())
    return shown


def prepare(
    config: Config, run: Run, say: Callable[[str], None], start_ray: Callable[[], None], *, rerun_changed: bool,
    changed: str = "",
) -> Context:  # fmt: skip
    """Checks and commits everything that a run starts from; a fault in any input is raised here, before Ray starts."""
    context, toy = begin(config, run, say, start_ray, rerun_changed=rerun_changed, changed=changed)
    Prompter(context, toy).commit_all()
    return context


def begin(
    config: Config, run: Run, say: Callable[[str], None], start_ray: Callable[[], None], *, rerun_changed: bool,
    changed: str = "", model: str | None = None,
) -> tuple[Context, dict[str, str]]:  # fmt: skip
    """A context with everything but prompts, and the tiny world's parts by name; `model` in place of `model.path`."""
    check_plugs(config)
    template = load_template(config.template.name, config.template.layout, config.strategy.name)
    toy = toy_parts(config, run, say) if config.toy else {}
    folder = folders.resolve(model or toy.get(config.model.path, config.model.path), "model.path")
    folders.check_policy(folder, config.model.context_tokens)
    policy = Policy(folder, folders.content_hash(folder))
    context = Context(config, run, say, start_ray, rerun_changed, template, policy, changed=changed)
    for name in reward_model_names(config.scorer):
        field_name = reward_model_field(config.scorer)
        folder = folders.resolve(toy.get(name, name), field_name)
        folders.check_reward_model(folder, field_name)
        context.reward_models[name] = Policy(folder, folders.content_hash(folder))
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
