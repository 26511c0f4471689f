"""Where the time of a whole iteration of the demo goes, from the events and the ledger that every run writes.

* `iteration_overhead`: the share of an iteration's wall time in which no engine and no training was at work, in %. The start of
  actors, of pipelines and worker groups and of models is apart: it is neither in the share nor in the time that it is a share of.

An iteration lasts from the end of the one before to its own end, the report in between included. Engines work side by side:
their seconds are divided by their number. The first iteration also starts what later ones keep, so the last one is measured.
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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    parser.add_argument("--recipe", type=Path, default=JOBS / "recipes" / "tiny.toml")
    parser.add_argument("--iterations", type=int, default=2, help="of the run; the last one is measured")
    parser.add_argument("--run", type=Path, help="a finished run to measure in place of a new one")


def rows(given: argparse.Namespace) -> list[Row]:
    if given.run:
        return [row(given.run)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        asked = [str(given.recipe), *given.overrides, f"iterations={given.iterations}", "--run", str(root)]
        code = subprocess.run([sys.executable, str(JOBS / "iterate.py"), *asked], stdout=sys.stderr).returncode
        if code:
            raise ResourceError(f"iteration: the run ended with exit code {code}; see the lines above")
        return [row(root)]


def row(root: Path) -> Row:
    try:
        actors = json.loads((root / "config.json").read_bytes())["engine"]["actors"]
        events = read_jsonl(root / "events.jsonl")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--run {root}: is no run directory that can be read: {error}") from None
    return share(events, ledger(Run(root), actors)["stages"], actors, str(root))


def share(events: list[dict[str, Any]], lines: list[dict[str, Any]], actors: int, where: str) -> Row:
    """The row of the last iteration of a run."""
    ends: dict[int, datetime.datetime] = {}
    for event in events:
        if event["event"] == "stage_end" and event["iteration"] is not None:
            ends[event["iteration"]] = when(event)
    last = max(ends, default=0)
    if last < 1 or last - 1 not in ends or sum(event["event"] == "driver_start" for event in events) != 1:
        raise UserError(f"--run {where}: must be a run of an iteration after another one, and of one submission")
    wall = (ends[last] - ends[last - 1]).total_seconds()
    stages = {line["stage"]: spent(line, events, actors) for line in lines if line["iteration"] == last}
    start, work = (sum(part[name] for part in stages.values()) for name in ("start", "work"))
    counts: dict[str, Any] = {
        "iteration": last,
        "wall, s": round(wall, 1),
        "start, s": round(start, 1),
        "engines and training, s": round(work, 1),
        "in no stage, s": round(wall - sum(part["wall"] for part in stages.values()), 1),
    }
    for name, part in stages.items():
        if part["wall"]:
            rest = part["wall"] - part["start"] - part["work"]
            counts[name] = f"{part['wall']:.1f} s: start {part['start']:.1f}, work {part['work']:.1f}, rest {rest:.1f}"
    return Row("iteration_overhead", "%", [100 * (1 - work / (wall - start))], counts)


def spent(line: dict[str, Any], events: list[dict[str, Any]], actors: int) -> dict[str, float]:
    """Wall seconds of a stage, and of these what went into starts and into work."""
    start, work = (line["start_seconds"] or 0.0) / actors, (line["engine_seconds"] or 0.0) / actors
    if line["train_seconds"] is not None:
        start, work = until_loaded(line, events), line["train_seconds"]
    elif line["engine_seconds"] is not None:
        start += until_begun(line, events)
    return {"wall": line["seconds"], "start": start, "work": work}


def until_loaded(line: dict[str, Any], events: list[dict[str, Any]]) -> float:
    """Seconds from the start of a training until its worker group has loaded its first model."""
    begun = None
    for event in events:
        if event["event"] == "stage_start" and (event["iteration"], event["stage"]) == (line["iteration"], line["stage"]):
            begun = when(event)
        elif event["event"] == "model_loaded" and begun is not None:
            return (when(event) - begun).total_seconds()
    return 0.0


def until_begun(line: dict[str, Any], events: list[dict[str, Any]]) -> float:
    """Seconds from the start of each pipeline of a stage until a shard was handed to an engine."""
    found, begun = 0.0, None
    for event in events:
        if (event.get("iteration"), event.get("stage")) != (line["iteration"], line["stage"]):
            continue
        if event["event"] == "stage_start":
            begun = when(event)
        elif event["event"] == "shard" and begun is not None:  # the first that is done was among the first to go in
            found += (datetime.datetime.fromisoformat(event["begun"]) - begun).total_seconds()
            begun = None
    return found


def when(event: dict[str, Any]) -> datetime.datetime:
    return datetime.datetime.fromisoformat(event["time"])
