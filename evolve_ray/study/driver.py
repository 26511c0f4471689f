"""The study: runs recipes x seeds of the tiny world one after the other, and reports which claims of the method hold."""

import argparse
import difflib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.config.load import from_json, load
from evolve_ray.config.options import Config, texts_in_view
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError, run_command
from evolve_ray.inputs.prompts import HELD_OUT, LATER
from evolve_ray.store.files import report_disk_errors, write_atomic
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.rows import read_jsonl
from evolve_ray.store.run import Run
from evolve_ray.study.claims import claims
from evolve_ray.study.judge import judge
from evolve_ray.study.results import Result, read_result
from evolve_ray.study.tables import figure, study_page

SEEDS, QUICK_SEEDS = "0,1,2", "0"
RECIPES, QUICK_RECIPES = "tiny,tiny_iterative_dpo,tiny_rule,tiny_parallel,tiny_reward_model", "tiny,tiny_iterative_dpo"
SPLITS = ("heldout", "long", "desc")

# Stages of iteration 0, and the parts of the configuration that their keys are made of (in inputs/ and stages/).
TRAINED = ("activation_pairs", "offline_pairs", "activation", "reference", "checkpoint")

# "held out" is among them, because triples on an evaluation prompt are left out of the training.
TRAINED_FROM = ("seed", "toy", "model", "activation", "offline", "template", "trainer", "held out")
MEASURED = ("held_out", "base_evaluation", "evaluation")
MEASURED_FROM = ("evaluation", "sampling", "engine", "scorer", "verifier", "refresh", "fitting prompts")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="study.py",
        description="Runs recipes x seeds of the tiny world and reports which claims hold; the same command continues a study.",
    )
    parser.add_argument("--quick", action="store_true", help=f"seed {QUICK_SEEDS} of {QUICK_RECIPES} only")
    parser.add_argument("--seeds", help=f"separated by commas (default: {SEEDS}); each seed has its own base model")
    parser.add_argument("--recipes", help=f"names in jobs/recipes, separated by commas (default: {RECIPES})")
    parser.add_argument("--out", default="runs/study", help="folder of the study (default: runs/study)")
    parser.add_argument("--json", help="file for the claims (default: OUT/study.json)")
    parser.add_argument("--only-report", action="store_true", help="start no run; report on the finished runs")
    return parser.parse_args(arguments)


def main(arguments: list[str], jobs: Path, execute: Callable[[list[str]], int] | None = None) -> int:
    """Runs the study and returns the exit code; `jobs` is the folder of iterate.py and recipes/, `execute` runs a command."""
    args = parse(arguments)
    study_command = shlex.join(["python", "jobs/study.py", *arguments])

    def command() -> int:
        seeds = read_seeds(args.seeds or (QUICK_SEEDS if args.quick else SEEDS))
        recipes = read_recipes(args.recipes or (QUICK_RECIPES if args.quick else RECIPES), jobs / "recipes")
        out = Path(args.out)
        if not args.only_report:
            for seed in seeds:
                for recipe in recipes:
                    run(recipe, seed, jobs, out, execute or execute_command, study_command)
        results = read_results(recipes, seeds, out, jobs)
        all_claims = claims(results, study_command)
        text = study_page(results, all_claims, study_command)
        write_atomic(out / "STUDY.md", text.encode())
        target = Path(args.json) if args.json else out / "study.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, json.dumps(all_claims, indent=1).encode())
        figure(results, out / "study.svg")
        say(text)
        say(f"tables: {out / 'STUDY.md'}\nclaims: {target}\nfigure: {out / 'study.svg'}")
        return 0

    return run_command(command, study_command)


def say(line: str, file: Any = None) -> None:
    print(line, file=file, flush=True)


def read_seeds(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UserError(f"--seeds {text}: must be whole numbers from 0, separated by commas, for example {SEEDS}")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def read_recipes(text: str, folder: Path) -> list[str]:
    """The recipe names of `text`; raises `UserError` before any run if one is unknown or lacks a table that the study needs."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    existing = sorted(path.stem for path in folder.glob("*.toml"))
    for name in names:
        if name not in existing:
            nearest = difflib.get_close_matches(name, existing, n=1, cutoff=0.0)
            raise UserError(
                f"--recipes: {folder} has no recipe {name!r}" + (f"; the nearest is {nearest[0]!r}" if nearest else "")
            )
        config = load(folder / f"{name}.toml")
        missing = [f"[{table}]" for table in ("toy", "activation", "verifier") if getattr(config, table) is None]
        missing += [f"evaluation.splits.{split}" for split in SPLITS if split not in config.evaluation.splits]
        if missing:
            raise UserError(f"{folder / name}.toml: has no {', '.join(missing)}, which the study needs; remove it from --recipes")
    return names


def run_folder(out: Path, recipe: str, seed: int) -> Path:
    """The run directory. All runs of a seed are in one folder, because they share the tiny world that is kept beside them."""
    return out / f"seed-{seed}" / recipe


def run(recipe: str, seed: int, jobs: Path, out: Path, execute: Callable[[list[str]], int], study_command: str) -> None:
    """Starts or resumes one run, in a process of its own so that only one local Ray runs at a time.

    Raises `UserError` with `study_command`, which continues the study, if the run fails.
    """
    path, root = Path(os.path.relpath(jobs)) / "recipes" / f"{recipe}.toml", run_folder(out, recipe, seed)
    overrides = [f"seed={seed}", f"toy.seed={seed}"]
    command = [sys.executable, os.path.relpath(jobs / "iterate.py"), str(path), *overrides, "--run", str(root)]
    say(f"== {recipe}, seed {seed}: {shlex.join(command)}")
    if shared := share_iteration_zero(load(path, overrides), root):
        say(f"   iteration 0 is shared: {shared}")
    start = time.monotonic()
    code = execute(command)
    if code:
        raise UserError(
            f"{recipe}, seed {seed}: ended with exit code {code}, see the lines above; continue with: {study_command}"
        )
    say(f"== {recipe}, seed {seed}: {time.monotonic() - start:.0f} s\n")


def execute_command(command: list[str]) -> int:
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal interrupts the run too; wait until it has stopped its Ray
        raise


def same_stages(config: Config, other: Config) -> list[str]:
    """Stages of iteration 0 that have the same result in two runs of one seed."""

    def parts(config: Config, names: tuple[str, ...]) -> list[Any]:
        tree = resolved(config, runtime=False)
        prompts = config.prompts
        fitting = tree["fitting prompts"] = [texts_in_view(config.strategy), prompts.max_rejected_fraction, prompts.system]
        tree["held out"] = [getattr(config.evaluation, name) for name in (*HELD_OUT, *LATER)] + [
            config.sampling.max_tokens,
            *fitting,
        ]
        return [tree[name] for name in names]

    if parts(config, TRAINED_FROM) != parts(other, TRAINED_FROM):
        return []
    measured = parts(config, MEASURED_FROM) == parts(other, MEASURED_FROM)
    return [*TRAINED, *(MEASURED if measured else ())]


def share_iteration_zero(config: Config, root: Path) -> str:
    """Gives a new run the committed stages of iteration 0 that it has in common with another run of its seed.

    All stages come from one run, since an evaluation belongs to the checkpoint that it measured. The files are hard-linked into
    a temporary folder, and the whole iteration is renamed into place. Returns the names and source of the shared stages, "" if
    there are none.
    """
    target = Run(root).iteration(0)
    if target.exists():
        return ""
    names: list[str] = []
    for path in sorted(root.parent.glob("*/config.json")):
        folder = Run(path.parent).iteration(0)
        same = same_stages(config, from_json(json.loads(path.read_bytes()), str(path)))
        committed = [name for name in same if read_manifest(folder / name)]
        if len(committed) > len(names):
            names, source = committed, folder
    if not names:
        return ""
    aside = root / ".iteration-00"
    shutil.rmtree(aside, ignore_errors=True)
    with report_disk_errors(target):
        for name in names:
            shutil.copytree(source / name, aside / name, copy_function=link)
        os.rename(aside, target)
    Run(root).event("shared", iteration=0, source=str(source), stages=names)
    return f"{', '.join(names)} of {source}"


def link(source: str, target: str) -> None:
    """Hard-links a file, or copies it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def finished(root: Path) -> bool:
    """Whether the last driver of the run finished."""
    if not (root / "report.json").exists():
        return False
    drivers = [event["event"] for event in read_jsonl(root / "events.jsonl") if event["event"].startswith("driver_")]
    return drivers[-1:] == ["driver_end"]


def judge_run(root: Path, seed: int, jobs: Path) -> dict[str, float]:
    """The scores of the held-out drafts of a run by draft id, from the trained reward model of the seed."""
    overrides = [f"seed={seed}", f"toy.seed={seed}"]
    config = load(jobs / "recipes" / "tiny_reward_model.toml", overrides)
    return judge(root, config, json.loads((root / "report.json").read_bytes())["models"], say)


def read_results(recipes: list[str], seeds: list[int], out: Path, jobs: Path) -> list[Result]:
    results = []
    for recipe in recipes:
        for seed in seeds:
            root = run_folder(out, recipe, seed)
            if finished(root):
                results.append(read_result(root, recipe, seed, judge_run(root, seed, jobs)))
            else:
                say(f"{root}: is not finished, so it is left out")
    if not results:
        raise UserError(f"{out}: has no finished run of these recipes and seeds; remove --only-report to run them")
    return results
