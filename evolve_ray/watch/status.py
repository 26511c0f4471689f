"""`jobs/status.py`: the state of a run, read from its directory alone. It needs no Ray and no engine, and writes nothing.

The kernel knows whether a driver holds RUN/LOCK. To ask, this command takes a shared lock for a moment; a driver that starts at
exactly that moment would see the lock as held by another driver.
"""

import argparse
import datetime
import fcntl
import json
import shlex
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evolve_ray.errors import IntegrityError, UserError, run_command
from evolve_ray.report.ledger import committed_stages
from evolve_ray.store.manifest import MANIFEST, Manifest, read_manifest
from evolve_ray.store.places import run_argument
from evolve_ray.store.run import Run

TRAININGS = ("checkpoint", "activation", "reward_model")
FRESH_S = 120.0  # if the last event is younger, a driver on another host may run: a shared file system may not show its lock


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code; a known error is one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="status.py", description="Prints the state of a run: running, finished, failed or dead."
    )
    parser.add_argument("run", metavar="RUN", type=run_argument, help="a run directory")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    args = parser.parse_args(arguments)

    def command() -> int:
        summary = status(Run(args.run.resolve()))
        print(json.dumps(summary, indent=1, ensure_ascii=False) if args.json else describe(summary))
        return 0

    return run_command(command, shlex.join(["python", "jobs/status.py", *arguments]))


def status(run: Run, now: datetime.datetime | None = None) -> dict[str, Any]:
    """Returns the state of a run as plain data; times in seconds, null if a value is not known.

    `state`: `running` (a driver holds the lock), `finished`, `failed` (the driver recorded an error), `dead` (the driver ended
    without an event), `unknown` (a driver on another host, whose lock this machine cannot see), `new` (no driver has recorded
    its start). UserError if the folder is not a run directory.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    if not (run.root / "LOCK").exists() and not (run.root / "events.jsonl").exists():
        raise UserError(
            f"{run.root}: is not a run directory: it has no LOCK and no events.jsonl; give the --run of jobs/iterate.py"
        )
    events, num_torn = read_events(run.root / "events.jsonl")
    config, holder = read_json(run.root / "config.json"), read_json(run.root / "LOCK")
    starts = [index for index, event in enumerate(events) if event["event"] == "driver_start"]
    attempt = events[starts[-1] :] if starts else []
    ends = [event for event in attempt if event["event"] in ("driver_end", "driver_failed")]
    age = (now - time_of(events[-1])).total_seconds() if events else None
    stage = current_stage(run, attempt, config)
    errors = [event for event in events if event["event"] == "driver_failed"]
    decisions = [event for event in events if event["event"] == "decision"]
    summary: dict[str, Any] = {
        "run": str(run.root),
        "name": config.get("name"),
        "state": state(run, holder, ends, attempt, age),
        "holder": holder or None,
        "attempts": len(starts),
        "last_event": {**(pick(events, "event", "time") or {}), "age_s": round(age, 1)} if age is not None else None,
        "iterations": config.get("iterations"),
        "stage": stage,
        "committed": {str(number): names for number, names in committed(run).items()},
        "engine": engine_figures(run, stage),
        "rejected": rejected(run),
        "decision": pick(decisions, "iteration", "action", "reason"),
        "error": pick(errors, "time", "error"),
        "torn_events": num_torn,
    }
    command = next((event["command"] for event in reversed(events) if event.get("command")), None)
    summary["next"] = next_step(summary, command or f"python jobs/iterate.py RECIPE.toml --run {run.root}")
    return summary


def state(run: Run, holder: dict, ends: list[dict], attempt: list[dict], age: float | None) -> str:
    """Returns the state that `status` describes; `attempt` are the events of the last driver, `ends` those that end it."""
    if lock_is_held(run.root / "LOCK"):
        return "running"
    if ends:
        return "finished" if ends[-1]["event"] == "driver_end" else "failed"
    if not attempt:
        return "new"
    on_other_host = holder.get("host") not in (None, socket.gethostname())
    return "unknown" if on_other_host and age is not None and age < FRESH_S else "dead"


def lock_is_held(path: Path) -> bool:
    """Whether a driver holds the lock file."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def current_stage(run: Run, attempt: list[dict], config: dict) -> dict[str, Any] | None:
    """Returns the stage that the last driver started and did not end, with its progress; None if there is none."""
    open_index = None
    for index, event in enumerate(attempt):
        if event["event"] == "stage_start":
            open_index = index
        elif event["event"] == "stage_end":
            open_index = None
    if open_index is None:
        return None
    start = attempt[open_index]
    name, iteration = start["stage"], start["iteration"]
    stage = {"iteration": iteration, "stage": name, "since": start["time"], "shards": None, "training": None}
    if iteration is None:
        return stage
    if name in TRAININGS or name.endswith("_checkpoint"):
        steps = [event for event in attempt[open_index:] if event["event"] == "training"]
        stage["training"] = pick(steps, "step", "num_steps", "loss", "learning_rate", "gradient_norm")
        return stage
    shards = sorted(committed_shards(run, iteration, name))
    total = num_shards(run, iteration, name, config)
    if shards or total:
        kinds = Counter(kind for kind, _ in shards)
        stage["shards"] = {"total": total, **{kind: kinds[kind] for kind in ("generations", "scores") if kinds[kind]}}
    return stage


def committed_shards(run: Run, iteration: int, stage: str) -> Iterator[tuple[str, Path]]:
    """Yields (`generations` or `scores`, folder) for every committed shard of a stage that is not committed itself.

    The stage `generations` writes scores at the same time, in their own folder; an evaluation writes both in its folder.
    """
    folder = run.iteration(iteration)
    names = ("generations", "scores") if stage == "generations" else (stage,)
    for name in names:
        work_folders = sorted(folder.glob(f".{name}-*"), key=lambda path: path.stat().st_mtime)
        for manifest in work_folders[-1].glob(f"**/shard-*/{MANIFEST}") if work_folders else ():
            parent = manifest.parent.parent.name
            yield ("scores" if "scores" in parent or stage == "labels" else "generations"), manifest.parent


def num_shards(run: Run, iteration: int, stage: str, config: dict) -> int | None:
    """Returns how many shards of each kind the stage will have; None if it has none or its prompts are not committed."""
    is_evaluation = stage.endswith("evaluation")
    if not is_evaluation and stage not in ("generations", "labels"):
        return None
    prompts = read_manifest(run.iteration(0) / "held_out" if is_evaluation else run.iteration(iteration) / "prompts")
    if prompts is None or not config:
        return None
    rows = prompts.stats["num_rows"]
    if stage == "labels" and config.get("refresh"):
        rows = min(rows, config["refresh"]["prompts"])
    passes = 2 if is_evaluation and config["evaluation"]["parallel"] else 1
    return passes * -(-rows // config["engine"]["shard_prompts"])


def engine_figures(run: Run, stage: dict | None) -> dict[str, Any] | None:
    """Returns generated tokens and speed of the engines, for the current stage or else the last committed generations."""
    manifests: list[Manifest | None] = []
    if stage and stage["shards"]:
        shards = committed_shards(run, stage["iteration"], stage["stage"])
        manifests = [read_manifest(folder) for kind, folder in shards if kind == "generations"]
    if not manifests:
        generations = [manifest for _, manifest in committed_stages(run) if manifest.stage == "generations"]
        manifests = list(generations[-1:])
    stats = [manifest.stats for manifest in manifests if manifest and manifest.stats.get("engine_seconds")]
    if not stats:
        return None
    tokens, prompt, cached = (sum(s[name] for s in stats) for name in ("num_tokens", "num_prompt_tokens", "num_cached_tokens"))
    seconds = sum(s["engine_seconds"] for s in stats)
    hit_rate = round(cached / (prompt or 1), 3)
    return {"num_tokens": tokens, "tokens_per_engine_s": round(tokens / seconds, 1), "cache_hit_rate": hit_rate}


def committed(run: Run) -> dict[int, list[str]]:
    """Returns the names of the committed stages by iteration."""
    names: dict[int, list[str]] = {}
    for iteration, manifest in committed_stages(run):
        names.setdefault(iteration, []).append(manifest.folder.name)
    return names


def rejected(run: Run) -> list[dict[str, Any]]:
    """Returns the committed stages that rejected rows, with their counts."""
    return [
        {"iteration": iteration, "stage": manifest.folder.name, "num_rejected": manifest.stats["num_rejected"],
         "num_in": manifest.stats.get("num_in")}
        for iteration, manifest in committed_stages(run) if manifest.stats.get("num_rejected")
    ]  # fmt: skip


def read_events(path: Path) -> tuple[list[dict], int]:
    """Returns (all events, the number of lines that are not JSON); a process that is killed may leave such a line."""
    events, num_torn = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            num_torn += 1
    return events, num_torn


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of the driver; {} if the file does not exist yet or is being written."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(value, dict):
        raise IntegrityError(f"{path}: is not a JSON object; delete it and submit the command of the run again")
    return value


def time_of(event: dict) -> datetime.datetime:
    return datetime.datetime.fromisoformat(event["time"])


def pick(events: list[dict], *names: str) -> dict[str, Any] | None:
    """Returns some fields of the last of `events`, None if there are no events."""
    return {name: events[-1].get(name) for name in names} if events else None


def next_step(summary: dict[str, Any], command: str) -> str:
    """Returns what the user should do next."""
    if summary["state"] == "finished":
        return f"read {summary['run']}/report.html"
    if summary["state"] == "running":
        return "nothing: the driver is running"
    if summary["state"] == "unknown":
        return f"check on host {summary['holder']['host']} whether process {summary['holder']['pid']} is alive; if not: {command}"
    return command


def describe(summary: dict[str, Any]) -> str:
    """Returns the summary as a few lines of text."""
    holder, last, stage = summary["holder"] or {}, summary["last_event"], summary["stage"]
    driver = f" (host {holder.get('host')}, process {holder.get('pid')}" if summary["state"] != "finished" and holder else ""
    driver += (f", job {holder['job']}" if holder.get("job") else "") + ")" if driver else ""
    lines = [f"run        {summary['name'] or '?'} in {summary['run']}", f"state      {summary['state']}{driver}"]
    if last:
        lines += [f"last event {last['event']}, {duration(last['age_s'])} ago"]
    if stage:
        of = "" if summary["iterations"] is None else f" of {summary['iterations']}"
        iteration = "" if stage["iteration"] is None else f"iteration {stage['iteration']}{of}: "
        lines += [f"stage      {iteration}{stage['stage']}{progress(stage)}"]
    elif summary["committed"]:
        number, names = max(summary["committed"].items(), key=lambda item: int(item[0]))
        lines += [f"committed  iteration {number}: {', '.join(names)}"]
    if engine := summary["engine"]:
        lines += [
            f"engines    {engine['num_tokens']:,} tokens generated, {engine['tokens_per_engine_s']:,} per second and engine, "
            f"{engine['cache_hit_rate']:.0%} of the prompt tokens from the cache"
        ]
    lines += [
        f"rejected   iteration {row['iteration']}: {row['stage']}: {row['num_rejected']:,} of {row['num_in'] or '?'} rows"
        for row in summary["rejected"]
    ]
    if decision := summary["decision"]:
        lines += [f"decision   iteration {decision['iteration']}: {decision['action']}: {decision['reason']}"]
    if summary["error"]:
        label = "error" if summary["state"] == "failed" else "old error"
        lines += [f"{label:<10} {summary['error']['error'].strip().splitlines()[0]}"]
    return "\n".join([*lines, f"next       {summary['next']}"])


def progress(stage: dict[str, Any]) -> str:
    """Returns the progress of the current stage: its step and loss, or its shards."""
    if training := stage["training"]:
        return f", step {training['step'] + 1} of {training['num_steps']}, loss {training['loss']:.4f}"
    if shards := stage["shards"]:
        of = f" of {shards['total']}" if shards["total"] else ""
        counts = [f"{kind} {shards[kind]}{of} shards" for kind in ("generations", "scores") if kind in shards]
        return ", " + (", ".join(counts) or f"no shard{of} yet")
    return ""


def duration(seconds: float) -> str:
    """Returns a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
