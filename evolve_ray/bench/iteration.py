"""Measures where the time of an iteration of the demo goes, from the events and the ledger that every run writes.

* `iteration_overhead`: the share of an iteration's wall time in which no engine and no training worked, in %. The start of
  actors, pipelines, worker groups and models is subtracted from both: from the overhead and from the wall time.

An iteration lasts from the end of the previous one to its own end; this includes the report between them. Engines work side by
side, so their seconds are divided by their number. The first iteration also starts what later ones reuse, so the last
iteration is measured.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from evolve_ray.bench.table import Row
from evolve_ray.errors import ResourceError, UserError
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
        return [run_row(args.run)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        arguments = [str(args.recipe), *args.overrides, f"iterations={args.iterations}", "--run", str(root)]
        code = subprocess.run([sys.executable, str(JOBS / "iterate.py"), *arguments], stdout=sys.stderr).returncode
        if code:
            raise ResourceError(f"iteration: the run ended with exit code {code}; see the lines above")
        return [run_row(root)]


def run_row(root: Path) -> Row:
    try:
        actors = json.loads((root / "config.json").read_bytes())["engine"]["actors"]
        events = read_jsonl(root / "events.jsonl")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--run {root}: is not a readable run directory: {error}") from None
    return share(events, ledger(Run(root), actors)["stages"], actors, str(root))


def share(events: list[dict[str, Any]], lines: list[dict[str, Any]], actors: int, run_name: str) -> Row:
    """Returns the row of the last iteration of a run."""
    ends: dict[int, datetime.datetime] = {}
    for event in events:
        if event["event"] == "stage_end" and event["iteration"] is not None:
            ends[event["iteration"]] = time_of(event)
    last = max(ends, default=0)
    if last < 1 or last - 1 not in ends or sum(event["event"] == "driver_start" for event in events) != 1:
        raise UserError(f"--run {run_name}: must have two finished iterations in a row and no resume; give another run")
    wall = (ends[last] - ends[last - 1]).total_seconds()
    stages = {line["stage"]: stage_seconds(line, events, actors) for line in lines if line["iteration"] == last}
    start, work = (sum(seconds[name] for seconds in stages.values()) for name in ("start", "work"))
    counts: dict[str, Any] = {
        "iteration": last,
        "wall, s": round(wall, 1),
        "start, s": round(start, 1),
        "engines and training, s": round(work, 1),
        "in no stage, s": round(wall - sum(seconds["wall"] for seconds in stages.values()), 1),
    }
    for name, seconds in stages.items():
        if seconds["wall"]:
            rest = seconds["wall"] - seconds["start"] - seconds["work"]
            counts[name] = f"{seconds['wall']:.1f} s: start {seconds['start']:.1f}, work {seconds['work']:.1f}, rest {rest:.1f}"
    return Row("iteration_overhead", "%", [100 * (1 - work / (wall - start))], counts)


def stage_seconds(line: dict[str, Any], events: list[dict[str, Any]], actors: int) -> dict[str, float]:
    """Returns the wall seconds of a stage, and how many of them went into starts and into work."""
    start, work = (line["start_seconds"] or 0.0) / actors, (line["engine_seconds"] or 0.0) / actors
    if line["train_seconds"] is not None:
        start, work = until_loaded(line, events), line["train_seconds"]
    elif line["engine_seconds"] is not None:
        start += until_begun(line, events)
    return {"wall": line["seconds"], "start": start, "work": work}


def until_loaded(line: dict[str, Any], events: list[dict[str, Any]]) -> float:
    """Returns seconds from the start of a training until its worker group loaded the first model."""
    start = None
    for event in events:
        if event["event"] == "stage_start" and (event["iteration"], event["stage"]) == (line["iteration"], line["stage"]):
            start = time_of(event)
        elif event["event"] == "model_loaded" and start is not None:
            return (time_of(event) - start).total_seconds()
    return 0.0


def until_begun(line: dict[str, Any], events: list[dict[str, Any]]) -> float:
    """Returns seconds from the start of each pipeline of a stage until an engine got the first shard."""
    total, start = 0.0, None
    for event in events:
        if (event.get("iteration"), event.get("stage")) != (line["iteration"], line["stage"]):
            continue
        if event["event"] == "stage_start":
            start = time_of(event)
        elif event["event"] == "shard" and start is not None:  # the first finished shard was among the first to start
            total += (datetime.datetime.fromisoformat(event["begun"]) - start).total_seconds()
            start = None
    return total


def time_of(event: dict[str, Any]) -> datetime.datetime:
    return datetime.datetime.fromisoformat(event["time"])
