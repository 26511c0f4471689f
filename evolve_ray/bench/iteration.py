"""Measures where the time of an iteration of the demo goes, from the ledger's clock, which every run writes.

* `iteration_overhead`: the share of an iteration's wall time in which no engine, no scorer and no training worked, in %. The
  start of processes, pipelines, worker groups and models is subtracted from both: from the overhead and from the wall time;
* `iteration_outside`: the same share with these starts.

The first iteration also starts what later ones reuse, so the last iteration is measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from evolve_ray.bench.table import Row
from evolve_ray.errors import ResourceError, UserError
from evolve_ray.report.clock import PARTS, TITLES
from evolve_ray.report.ledger import ledger
from evolve_ray.store.rows import read_jsonl
from evolve_ray.store.run import Run

JOBS = Path(__file__).resolve().parents[2] / "jobs"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that override the recipe")
    parser.add_argument("--recipe", type=Path, default=JOBS / "recipes" / "tiny.toml")
    parser.add_argument("--iterations", type=int, default=2, help="iterations of the run; the last one is measured")
    parser.add_argument("--run", type=Path, help="a finished run to measure instead of a new one")


def rows(args: argparse.Namespace) -> list[Row]:
    if args.run:
        return run_rows(args.run)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        arguments = [str(args.recipe), *args.overrides, f"iterations={args.iterations}", "--run", str(root)]
        code = subprocess.run([sys.executable, str(JOBS / "iterate.py"), *arguments], stdout=sys.stderr).returncode
        if code:
            raise ResourceError(f"iteration: the run ended with exit code {code}; see the lines above")
        return run_rows(root)


def run_rows(root: Path) -> list[Row]:
    """Returns the rows of the last iteration of a run."""
    try:
        actors = json.loads((root / "config.json").read_bytes())["engine"]["actors"]
        events = read_jsonl(root / "events.jsonl")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--run {root}: is not a readable run directory: {error}") from None
    times = ledger(Run(root), actors)["clock"]
    if len(times) < 2 or times[-1]["iteration"] < 1 or sum(event["event"] == "driver_start" for event in events) != 1:
        raise UserError(f"--run {root}: must have two finished iterations in a row and no resume; give another run")
    return shares(times[-1])


def shares(last: dict[str, Any]) -> list[Row]:
    """Returns both rows from the clock of an iteration."""
    work = sum(last[name] for name in ("engines", "scoring", "updates"))
    counts = {"iteration": last["iteration"], "wall, s": round(last["seconds"], 1)}
    counts |= {f"{TITLES[name]}, s": round(last[name], 1) for name in PARTS}
    return [
        Row("iteration_overhead", "%", [100 * (1 - work / (last["seconds"] - last["starts"]))], counts),
        Row("iteration_outside", "%", [100 * (1 - work / last["seconds"])]),
    ]
