"""`jobs/report.py`: rewrites the page of one run, or sets the models of several runs side by side on the splits they share."""

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
    """Returns the exit code; a known fault is one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="report.py", description="Rewrites the page of a run, or compares several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=run_argument, help="a run directory with a report.json")
    parser.add_argument("--html", metavar="FILE", type=Path, help="where the page goes (one run: RUN/report.html)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where the figures go")
    given = parser.parse_args(arguments)

    def command() -> int:
        roots = [path.resolve() for path in given.runs]
        if len(roots) == 1:
            found = read_report(roots[0])
            write_page(Run(roots[0]), found, given.html)
        else:
            found = compare(roots)
            if given.html:
                write_atomic(given.html, render(found).encode())
        if given.json:
            write_atomic(given.json, json.dumps(found, indent=1, ensure_ascii=False).encode())
        print(tables.table({"models": [{**model, "name": name_of(model)} for model in found["models"]]}))
        for note in found.get("notes", []):
            print(f"\n{note}")
        return 0

    return run_command(command, shlex.join(["python", "jobs/report.py", *arguments]))


def read_report(root: Path) -> dict[str, Any]:
    try:
        return json.loads((root / "report.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{root}: has no report.json; give the directory of a run that has finished an iteration") from None
    except ValueError:
        raise UserError(f"{root / 'report.json'}: is not JSON; submit the run again, which rewrites it") from None


def compare(roots: list[Path]) -> dict[str, Any]:
    """Their models, each with the label of its `run`, on the splits that all runs ask with the same prompts."""
    if len(set(roots)) < len(roots):
        raise UserError("the same run is named twice; name each run once")
    reports = dict(zip(labels(roots), [read_report(root) for root in roots], strict=True))
    prompts = [held_out(root) for root in roots]
    known = list(dict.fromkeys(split for found in prompts for split in found))
    shared = [split for split in known if all(split in found for found in prompts)]
    for split in shared:
        for root, found in zip(roots[1:], prompts[1:], strict=True):
            if found[split] != prompts[0][split]:
                raise UserError(f"split {split!r} asks other prompts in {root} than in {roots[0]}; such figures do not compare")
    if not shared:
        raise UserError(f"{', '.join(map(str, roots))}: share no evaluation split; such figures do not compare")
    left_out = [split for split in known if split not in shared]
    models = [
        {**model, "run": label, "splits": {split: model["splits"][split] for split in shared if split in model["splits"]}}
        for label, found in reports.items()
        for model in found["models"]
    ]
    notes = [f"Not in every run, so left out: {', '.join(left_out)}."] if left_out else []
    return {
        "name": " and ".join(reports),
        "runs": dict(zip(reports, map(str, roots), strict=True)),
        "models": models,
        "notes": notes,
    }


def labels(roots: list[Path]) -> list[str]:
    """The shortest paths that tell the runs apart: their folders' names, or what follows the folder they have in common."""
    names = [root.name for root in roots]
    return names if len(set(names)) == len(names) else [os.path.relpath(root, os.path.commonpath(roots)) for root in roots]


def held_out(root: Path) -> dict[str, str]:
    """A hash of each split's prompts and answers; where they were read from does not count."""
    manifest = read_manifest(Run(root).iteration(0) / "held_out")
    if manifest is None:
        raise UserError(f"{root}: has no held-out prompts, so there is nothing to compare; add [evaluation.splits] to its recipe")
    texts: dict[str, list[list]] = {}
    for row in read_table(manifest.path("prompts.parquet")):
        texts.setdefault(row["split"], []).append([row["prompt_id"], row["prompt"], row["answer"]])
    return {split: digest(sorted(found)) for split, found in texts.items()}


def render(compared: dict[str, Any]) -> str:
    """One page: the table, then the figures that a run's own page has."""
    runs = table(["run", "directory"], [[label, path] for label, path in compared["runs"].items()])
    text = "Models side by side on the splits that the runs share, with the same prompts. " + " ".join(compared["notes"])
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
