"""The command jobs/evaluate.py: arguments, lock, Ray, and one sentence at the end for an error."""

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path

from evolve_ray.compare import skill_probes as probing
from evolve_ray.compare.models import Plan
from evolve_ray.compare.strategies import read_strategies
from evolve_ray.config.load import load, load_stored
from evolve_ray.config.options import Config
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError, failure, run_command
from evolve_ray.evaluate.final_answers import PICKS
from evolve_ray.models import checkpoints
from evolve_ray.pools.session import start_ray, stop_ray
from evolve_ray.store.files import sha256_file
from evolve_ray.store.places import run_folder
from evolve_ray.store.rows import digest
from evolve_ray.store.run import Run
from evolve_ray.watch import progress
from evolve_ray.watch.terminal import say


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Evaluates models on the same prompts with the same seeds; the same command again continues.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help="a Hugging Face folder or name, or a run directory: RUN is its last model, RUN@base, RUN@activation, RUN@2 others",
    )  # fmt: skip
    parser.add_argument("--recipe", help="the recipe that sets template, sampling, engine, scorer and verifier (default: the "
                        "config.json of the first MODEL, if that is a run)")  # fmt: skip
    parser.add_argument("--data", nargs="+", action="extend", default=[], metavar="NAME=FILE_OR_DATASET",
                        help="prompts of each split (default: the recipe's evaluation.splits)")  # fmt: skip
    parser.add_argument("--probes", help="probes separated by commas, or none (default: of "
                        f"{','.join(probing.PROBES)} all that the data allows)")  # fmt: skip
    parser.add_argument("--foreign", metavar="MODEL", help="the model whose first drafts all models refine in the probe foreign "
                        "(default: the draft column of the data; without one, the first of several models)")  # fmt: skip
    parser.add_argument(
        "--draft-column", help="the column with drafts for the probe foreign (default: draft, if the data has it)"
    )
    parser.add_argument(
        "--strategy", action="append", default=[], metavar="NAME[,OPTION=VALUE...][,pick=PICK]",
        help="also measure the final answer of a strategy on the same prompts, for example parallel,samples=8,pick=vote; several "
             "--strategy are lines of one table (default options: the recipe's)")  # fmt: skip
    parser.add_argument("--pick", choices=tuple(PICKS), help="the answer that counts: that of the last round, the vote of all, "
                        "the best by the scorer, or what the strategy returned last (default: last)")  # fmt: skip
    parser.add_argument("--out", "--run", dest="out", metavar="DIR", help="the output folder (default: runs/evaluation-DIGEST)")
    parser.add_argument("--rerun-changed", action="store_true", help="recompute the stages whose options or inputs changed")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known error is one sentence, the last line on stderr."""
    args = parse(arguments)

    def command() -> int:
        model_names, data, overrides = sort_arguments(args.models, args.data)
        config = configuration(model_names[0], args.recipe, data, overrides)
        probes = choose_probes(args.probes)
        models = checkpoints.find_all(model_names)
        foreign = None if args.foreign is None else checkpoints.find(args.foreign)
        plan = Plan(config, models, probes, foreign, args.draft_column, read_strategies(args.strategy, args.pick, config))
        return run(plan, run_folder(args.out or default_folder(plan)), rerun_changed=args.rerun_changed)

    return run_command(command, shlex.join(["python", "jobs/evaluate.py", *arguments]))


def sort_arguments(positional: list[str], data: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Returns (models, {split: path}, key=value overrides).

    A key with a dot, or the name of an option, is an override wherever it stands on the command line.
    """
    option_names = {field.name for field in dataclasses.fields(Config)}
    models: list[str] = []
    splits: dict[str, str] = {}
    overrides: list[str] = []
    for text in positional:
        is_option = re.fullmatch(r"[A-Za-z_][\w.]*=.*", text, re.DOTALL) and not Path(text).exists()
        (overrides if is_option else models).append(text)
    for text in data:
        name, equals, path = text.partition("=")
        if "." in name or name in option_names:
            overrides.append(text)
        elif equals and path and name not in splits:
            splits[name] = path
        else:
            problem = "the split is given twice" if name in splits else "must have the form NAME=FILE_OR_DATASET"
            raise UserError(f"--data {text}: {problem}; put models before --data")
    if not models:
        raise UserError("MODEL: is missing; give a model folder, a Hugging Face model name or a run directory")
    return models, splits, overrides


def configuration(first: str, recipe: str | None, data: dict[str, str], overrides: list[str]) -> Config:
    """Returns the recipe, or the configuration of the first model's run; `data` replaces its evaluation.splits."""
    run = Path(first) if checkpoints.is_run(Path(first)) else Path(first.rpartition("@")[0])
    if data:  # as an override, so that it is checked like any option
        splits = ", ".join(f"{json.dumps(name)} = {json.dumps(path)}" for name, path in data.items())
        overrides = [*overrides, f"evaluation.splits={{{splits}}}"]
    if recipe:
        config = load(recipe, overrides)
    elif first and checkpoints.is_run(run):
        config = load_stored(run, overrides)
    else:
        raise UserError(f"--recipe: is missing, and the first MODEL ({first}) is not a run that has one; give --recipe FILE")
    if not config.evaluation.splits:
        raise UserError("--data: is missing, and the recipe has no [evaluation.splits]; give --data NAME=FILE")
    return config


def choose_probes(text: str | None) -> tuple[str, ...]:
    """Returns the probes named in `text`; all probes if `text` is None."""
    names = (
        probing.PROBES if text is None else tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))
    )
    for name in names:
        if name not in probing.PROBES:
            raise UserError(f"--probes {name}: unknown probe; choose from {', '.join(probing.PROBES)}, or none")
    return names


def default_folder(plan: Plan) -> str:
    """Returns the output folder: the same for the same models, data and options; next to the first model's run, else in runs/."""
    config = plan.config
    files = [sha256_file(Path(path)) if Path(path).is_file() else path for path in config.evaluation.splits.values()]
    identity = [resolved(config, runtime=False), files, [(model.name, model.hash) for model in plan.models]]
    identity += [plan.probes, plan.foreign.hash if plan.foreign else None, plan.draft_column]
    identity += [[part.label, resolved(part.strategy), part.pick] for part in plan.measured]
    run = plan.models[0].run
    return str((run.resolve().parent if run else Path("runs")) / f"evaluation-{digest(identity)[:12]}")


def run(plan: Plan, root: Path, *, rerun_changed: bool) -> int:
    """Evaluates under the lock of `root`; prints the tables and the paths of the results."""
    from evolve_ray.compare import tables
    from evolve_ray.compare.models import compare
    from evolve_ray.inputs.prepare import settle_config

    folder = Run(root)
    with folder.locked():
        rerun_changed = rerun_changed or not folder.has_results()
        changed = settle_config(plan.config, folder, rerun_changed=rerun_changed)
        folder.event("driver_start", models=[model.given for model in plan.models])
        say(f"evaluation of {', '.join(model.name for model in plan.models)} in {root}")
        try:
            with progress.shown(folder, say):
                evaluation = compare(plan, folder, lambda: start_ray(plan.config), rerun_changed=rerun_changed, changed=changed)
        except BaseException as error:
            folder.event("driver_failed", **failure(error))
            raise
        finally:
            stop_ray()
        tables.write(folder, evaluation)
        folder.event("driver_end")
    say("")
    say(tables.text(evaluation))
    say(f"\nfigures: {root / 'evaluation.json'}\npage: {root / 'evaluation.html'}")
    return 0
