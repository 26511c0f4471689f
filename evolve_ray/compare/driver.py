"""The command around a comparison: arguments, lock, Ray, and one sentence at the end if something is wrong."""

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path

from evolve_ray.compare import skill_probes as probing
from evolve_ray.compare.models import Plan
from evolve_ray.config.load import from_json, load
from evolve_ray.config.options import Config
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import IntegrityError, UserError, run_command
from evolve_ray.models import checkpoints
from evolve_ray.pools.session import start_ray, stop_ray
from evolve_ray.store.files import sha256_file
from evolve_ray.store.places import run_folder
from evolve_ray.store.rows import digest
from evolve_ray.store.run import Run
from evolve_ray.watch.terminal import say


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Evaluates models side by side on the same prompts with the same seeds; the same command again continues.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help="a Hugging Face folder or name, or a run directory: RUN is its last model, RUN@base, RUN@activation, RUN@2 others",
    )  # fmt: skip
    parser.add_argument("--recipe", help="whose template, sampling, engine, scorer, verifier are used (default: the "
                        "config.json of the first MODEL, if that is a run)")  # fmt: skip
    parser.add_argument("--data", nargs="+", action="extend", default=[], metavar="NAME=FILE_OR_DATASET",
                        help="the prompts by split (default: the recipe's evaluation.splits)")  # fmt: skip
    parser.add_argument("--probes", help=f"separated by commas, or none (default: those of {','.join(probing.PROBES)} that the "
                        "data allow)")  # fmt: skip
    parser.add_argument("--foreign", metavar="MODEL", help="whose first drafts every model is asked to refine (default: the "
                        "draft column of the data, else the first of several models)")  # fmt: skip
    parser.add_argument(
        "--draft-column", help="the column with drafts for the probe `foreign` (default: draft, where there is one)"
    )
    parser.add_argument("--out", "--run", dest="out", metavar="DIR", help="where results go (default: runs/evaluation-DIGEST)")
    parser.add_argument("--rerun-changed", action="store_true", help="compute again the stages whose options or inputs changed")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known fault is one sentence on stderr, the last line of the command."""
    given = parse(arguments)

    def command() -> int:
        wanted, data, overrides = sort_arguments(given.models, given.data)
        config = configuration(wanted[0], given.recipe, data, overrides)
        probes = choose_probes(given.probes)
        models = checkpoints.find_all(wanted)
        foreign = None if given.foreign is None else checkpoints.find(given.foreign)
        plan = Plan(config, models, probes, foreign, given.draft_column)
        return run(plan, run_folder(given.out or default_folder(plan)), rerun_changed=given.rerun_changed)

    return run_command(command, shlex.join(["python", "jobs/evaluate.py", *arguments]))


def sort_arguments(positional: list[str], data: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """(models, {split: path}, key=value overrides). A dotted key, or one of a plain option, is an override wherever it stands."""
    plain = {field.name for field in dataclasses.fields(Config)}
    models: list[str] = []
    splits: dict[str, str] = {}
    overrides: list[str] = []
    for text in positional:
        is_option = re.fullmatch(r"[A-Za-z_][\w.]*=.*", text, re.DOTALL) and not Path(text).exists()
        (overrides if is_option else models).append(text)
    for text in data:
        name, equals, path = text.partition("=")
        if "." in name or name in plain:
            overrides.append(text)
        elif equals and path and name not in splits:
            splits[name] = path
        else:
            fault = "is a second file of that split" if name in splits else "must have the form NAME=FILE_OR_DATASET"
            raise UserError(f"--data {text}: {fault}; models stand before --data")
    if not models:
        raise UserError("MODEL: none is given; name a model folder, a hub name or a run directory")
    return models, splits, overrides


def configuration(first: str, recipe: str | None, data: dict[str, str], overrides: list[str]) -> Config:
    """The recipe, or what the first model's run was configured with; `data` replaces its evaluation.splits."""
    run = Path(first) if checkpoints.is_run(Path(first)) else Path(first.rpartition("@")[0])
    if data:  # as an option of its own, so that it is checked as one
        splits = ", ".join(f"{json.dumps(name)} = {json.dumps(path)}" for name, path in data.items())
        overrides = [*overrides, f"evaluation.splits={{{splits}}}"]
    if recipe:
        config = load(recipe, overrides)
    elif first and checkpoints.is_run(run):
        path = run / "config.json"
        try:
            tree = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path}: is gone; name the recipe with --recipe") from None
        except ValueError:
            raise IntegrityError(f"{path}: is damaged; name the recipe with --recipe") from None
        config = from_json(tree, str(path), overrides)
    else:
        raise UserError(f"--recipe: is missing, and the first MODEL ({first}) is no run that would have one; give --recipe FILE")
    if not config.evaluation.splits:
        raise UserError("--data: is missing, and the recipe has no [evaluation.splits]; give --data NAME=FILE")
    return config


def choose_probes(text: str | None) -> tuple[str, ...]:
    """Probes by name; all of them where nothing is said."""
    names = (
        probing.PROBES if text is None else tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))
    )
    for name in names:
        if name not in probing.PROBES:
            raise UserError(f"--probes {name}: is unknown; known are {', '.join(probing.PROBES)}, or none")
    return names


def default_folder(plan: Plan) -> str:
    """A folder that the same models, data and options lead to again: beside the first model's run, else in runs/."""
    config = plan.config
    files = [sha256_file(Path(path)) if Path(path).is_file() else path for path in config.evaluation.splits.values()]
    named = [resolved(config, runtime=False), files, [(model.name, model.hash) for model in plan.models]]
    named += [plan.probes, plan.foreign.hash if plan.foreign else None, plan.draft_column]
    run = plan.models[0].run
    return str((run.resolve().parent if run else Path("runs")) / f"evaluation-{digest(named)[:12]}")


def run(plan: Plan, root: Path, *, rerun_changed: bool) -> int:
    """Everything under the lock of `root`; prints the tables and where they are."""
    from evolve_ray.compare import tables
    from evolve_ray.compare.models import compare
    from evolve_ray.inputs.prepare import settle_config

    folder = Run(root)
    with folder.locked():
        changed = settle_config(plan.config, folder, rerun_changed=rerun_changed)
        folder.event("driver_start", models=[model.given for model in plan.models])
        say(f"evaluation of {', '.join(model.name for model in plan.models)} in {root}")
        try:
            found = compare(plan, folder, lambda: start_ray(plan.config), rerun_changed=rerun_changed, changed=changed)
        except BaseException as error:
            folder.event("driver_failed", error=f"{type(error).__name__}: {error}"[:2000])
            raise
        finally:
            stop_ray()
        tables.write(folder, found)
        folder.event("driver_end")
    say("")
    say(tables.text(found))
    say(f"\nfigures: {root / 'evaluation.json'}\npage: {root / 'evaluation.html'}")
    return 0
