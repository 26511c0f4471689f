"""`jobs/report.py`: rewrites the page of one run, or compares the models of several runs on the splits that they share."""

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError, run_command
from evolve_ray.report import costs, page, tables
from evolve_ray.report.markup import document, escape, section, table
from evolve_ray.report.report import write_page
from evolve_ray.report.views import name_of
from evolve_ray.store.files import write_atomic
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.places import run_argument
from evolve_ray.store.rows import digest, read_table
from evolve_ray.store.run import Run


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code; a known error is one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="report.py", description="Rewrites the page of a run, or compares several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=run_argument, help="a run directory with a report.json")
    parser.add_argument("--html", metavar="FILE", type=Path, help="file for the page (default for one run: RUN/report.html)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="file for the figures")
    args = parser.parse_args(arguments)

    def command() -> int:
        roots = [path.resolve() for path in args.runs]
        if len(roots) == 1:
            report = read_report(roots[0])
            write_page(Run(roots[0]), report, args.html)
        else:
            report = compare(roots)
            if args.html:
                write_atomic(args.html, render(report).encode())
        if args.json:
            write_atomic(args.json, json.dumps(report, indent=1, ensure_ascii=False).encode())
        print(tables.table({"models": [{**model, "name": name_of(model)} for model in report["models"]]}))
        for note in report.get("notes", []):
            print(f"\n{note}")
        return 0

    return run_command(command, shlex.join(["python", "jobs/report.py", *arguments]))


def read_report(root: Path) -> dict[str, Any]:
    try:
        return json.loads((root / "report.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{root}: has no report.json; give the directory of a run that has finished an iteration") from None
    except ValueError:
        raise UserError(f"{root / 'report.json'}: is not JSON; submit the run again to rewrite it") from None


def compare(roots: list[Path]) -> dict[str, Any]:
    """A report of the models of all runs, each with the label of its `run`, on the splits that all runs share.

    Raises `UserError` if the runs share no split, or if a split has different prompts in two runs.
    """
    if len(set(roots)) < len(roots):
        raise UserError("the same run is named twice; name each run once")
    reports = dict(zip(labels(roots), [read_report(root) for root in roots], strict=True))
    hashes = [held_out(root) for root in roots]
    splits = list(dict.fromkeys(split for of_run in hashes for split in of_run))
    shared = [split for split in splits if all(split in of_run for of_run in hashes)]
    for split in shared:
        for root, of_run in zip(roots[1:], hashes[1:], strict=True):
            if of_run[split] != hashes[0][split]:
                raise UserError(
                    f"split {split!r}: {root} has other prompts than {roots[0]}, so their figures cannot be compared; compare "
                    "runs with the same prompts"
                )
    if not shared:
        raise UserError(
            f"{', '.join(map(str, roots))}: have no evaluation split in common, so their figures cannot be compared; compare "
            "runs that share a split"
        )
    left_out = [split for split in splits if split not in shared]
    models = [
        {**model, "run": label, "splits": {split: model["splits"][split] for split in shared if split in model["splits"]}}
        for label, report in reports.items()
        for model in report["models"]
    ]
    notes = [f"Left out, because not every run has them: {', '.join(left_out)}."] if left_out else []
    return {
        "name": " and ".join(reports),
        "runs": dict(zip(reports, map(str, roots), strict=True)),
        "models": models,
        "notes": notes,
    }


def labels(roots: list[Path]) -> list[str]:
    """A label for each run: the name of its folder, or if two names are equal the path below the common folder."""
    names = [root.name for root in roots]
    return names if len(set(names)) == len(names) else [os.path.relpath(root, os.path.commonpath(roots)) for root in roots]


def held_out(root: Path) -> dict[str, str]:
    """`{split: hash of its prompts and answers}`; the files that they came from are not part of the hash."""
    manifest = read_manifest(Run(root).iteration(0) / "held_out")
    if manifest is None:
        raise UserError(f"{root}: has no held-out prompts, so there is nothing to compare; add [evaluation.splits] to its recipe")
    rows_of: dict[str, list[list]] = {}
    for row in read_table(manifest.path("prompts.parquet")):
        rows_of.setdefault(row["split"], []).append([row["prompt_id"], row["prompt"], row["answer"]])
    return {split: digest(sorted(rows)) for split, rows in rows_of.items()}


def render(compared: dict[str, Any]) -> str:
    """One page: the table of all models, then the same figures as the page of a run."""
    runs = table(["run", "directory"], [[label, path] for label, path in compared["runs"].items()])
    text = "The models of all runs on the splits that the runs share, with the same prompts. " + " ".join(compared["notes"])
    parts = [
        section("runs", "Runs", text, runs),
        page.side_by_side(compared),
        page.gains(compared),
        page.rounds(compared),
        page.transitions(compared),
        page.over_models(compared),
        costs.best_of(compared),
    ]
    title = f"{len(compared['runs'])} runs: {', '.join(compared['runs'])}"
    return document(title, f"<header><h1>{escape(title)}</h1></header>{''.join(parts)}")
