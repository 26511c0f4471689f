"""`jobs/status.py`: where a run stands, from its directory alone: no Ray, no engine, and nothing is written.

Whether a driver is at work is the kernel's answer about RUN/LOCK: it is asked for a moment with a shared lock, which a driver
that starts in that very moment would take for another driver.
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
FRESH_S = 120.0  # a younger last event speaks for a driver on another host, whatever the lock of a shared file system says


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known fault is one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="status.py", description="Says where a run stands, in progress, finished or dead.")
    parser.add_argument("run", metavar="RUN", type=run_argument, help="a run directory")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    given = parser.parse_args(arguments)

    def command() -> int:
        found = status(Run(given.run.resolve()))
        print(json.dumps(found, indent=1, ensure_ascii=False) if given.json else describe(found))
        return 0

    return run_command(command, shlex.join(["python", "jobs/status.py", *arguments]))


def status(run: Run, now: datetime.datetime | None = None) -> dict[str, Any]:
    """Everything that the directory tells, as plain data; times in seconds, null where nothing is known.

    `state`: `running` (a driver holds the lock), `finished`, `failed` (the driver said why), `dead` (it ended without a word),
    `unknown` (a driver of another host, whose lock this machine cannot see), `new` (no driver has come further than the lock).
    """
    now = now or datetime.datetime.now(datetime.UTC)
    if not (run.root / "LOCK").exists() and not (run.root / "events.jsonl").exists():
        raise UserError(f"{run.root}: is no run directory: it has no LOCK and no events.jsonl; give the --run of jobs/iterate.py")
    events, torn = read_events(run.root / "events.jsonl")
    config, holder = read_json(run.root / "config.json"), read_json(run.root / "LOCK")
    starts = [place for place, event in enumerate(events) if event["event"] == "driver_start"]
    attempt = events[starts[-1] :] if starts else []
    ends = [event for event in attempt if event["event"] in ("driver_end", "driver_failed")]
    age = (now - time_of(events[-1])).total_seconds() if events else None
    stage = stage_at_work(run, attempt, config)
    errors = [event for event in events if event["event"] == "driver_failed"]
    decisions = [event for event in events if event["event"] == "decision"]
    found: dict[str, Any] = {
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
        "torn_events": torn,
    }
    command = next((event["command"] for event in reversed(events) if event.get("command")), None)
    found["next"] = next_step(found, command or f"python jobs/iterate.py RECIPE.toml --run {run.root}")
    return found


def state(run: Run, holder: dict, ends: list[dict], attempt: list[dict], age: float | None) -> str:
    if lock_is_held(run.root / "LOCK"):
        return "running"
    if ends:
        return "finished" if ends[-1]["event"] == "driver_end" else "failed"
    if not attempt:
        return "new"
    elsewhere = holder.get("host") not in (None, socket.gethostname())
    return "unknown" if elsewhere and age is not None and age < FRESH_S else "dead"


def lock_is_held(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def stage_at_work(run: Run, attempt: list[dict], config: dict) -> dict[str, Any] | None:
    """The stage that the last driver began and did not end, with what is done of it."""
    open_at = None
    for place, event in enumerate(attempt):
        if event["event"] == "stage_start":
            open_at = place
        elif event["event"] == "stage_end":
            open_at = None
    if open_at is None:
        return None
    start = attempt[open_at]
    name, iteration = start["stage"], start["iteration"]
    found = {"iteration": iteration, "stage": name, "since": start["time"], "shards": None, "training": None}
    if iteration is None:
        return found
    if name in TRAININGS:
        steps = [event for event in attempt[open_at:] if event["event"] == "training"]
        found["training"] = pick(steps, "step", "num_steps", "loss", "learning_rate", "gradient_norm")
        return found
    parts = sorted(shard_manifests(run, iteration, name))
    total = num_shards(run, iteration, name, config)
    if parts or total:
        kinds = Counter(kind for kind, _ in parts)
        found["shards"] = {"total": total, **{kind: kinds[kind] for kind in ("generations", "scores") if kinds[kind]}}
    return found


def shard_manifests(run: Run, iteration: int, stage: str) -> Iterator[tuple[str, Path]]:
    """(`generations` or `scores`, folder) of every committed shard of a stage that is still in the making.

    A pipeline writes drafts and scores at once, an evaluation both inside its own folder.
    """
    folder = run.iteration(iteration)
    names = ("generations", "scores") if stage == "generations" else (stage,)
    for name in names:
        works = sorted(folder.glob(f".{name}-*"), key=lambda path: path.stat().st_mtime)
        for manifest in works[-1].glob(f"**/shard-*/{MANIFEST}") if works else ():
            inside = manifest.parent.parent.name
            yield ("scores" if "scores" in inside or stage == "labels" else "generations"), manifest.parent


def num_shards(run: Run, iteration: int, stage: str, config: dict) -> int | None:
    """Shards of each kind that the stage will have; None where it has none or its prompts are not committed."""
    evaluates = stage.endswith("evaluation")
    if not evaluates and stage not in ("generations", "labels"):
        return None
    prompts = read_manifest(run.iteration(0) / "held_out" if evaluates else run.iteration(iteration) / "prompts")
    if prompts is None or not config:
        return None
    rows = prompts.stats["num_rows"]
    if stage == "labels" and config.get("refresh"):
        rows = min(rows, config["refresh"]["prompts"])
    passes = 2 if evaluates and config["evaluation"]["parallel"] else 1
    return passes * -(-rows // config["engine"]["shard_prompts"])


def engine_figures(run: Run, stage: dict | None) -> dict[str, Any] | None:
    """Generated tokens and the engines' pace: of the stage at work, else of the last committed generations."""
    parts: list[Manifest | None] = []
    if stage and stage["shards"]:
        found = shard_manifests(run, stage["iteration"], stage["stage"])
        parts = [read_manifest(folder) for kind, folder in found if kind == "generations"]
    if not parts:
        last = [manifest for _, manifest in committed_stages(run) if manifest.stage == "generations"]
        parts = list(last[-1:])
    stats = [part.stats for part in parts if part and part.stats.get("engine_seconds")]
    if not stats:
        return None
    tokens, prompt, cached = (sum(s[name] for s in stats) for name in ("num_tokens", "num_prompt_tokens", "num_cached_tokens"))
    seconds = sum(s["engine_seconds"] for s in stats)
    hits = round(cached / (prompt or 1), 3)
    return {"num_tokens": tokens, "tokens_per_engine_s": round(tokens / seconds, 1), "cache_hit_rate": hits}


def committed(run: Run) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for iteration, manifest in committed_stages(run):
        names.setdefault(iteration, []).append(manifest.folder.name)
    return names


def rejected(run: Run) -> list[dict[str, Any]]:
    """Stages that did not use every row."""
    return [
        {"iteration": iteration, "stage": manifest.folder.name, "num_rejected": manifest.stats["num_rejected"],
         "num_in": manifest.stats.get("num_in")}
        for iteration, manifest in committed_stages(run) if manifest.stats.get("num_rejected")
    ]  # fmt: skip


def read_events(path: Path) -> tuple[list[dict], int]:
    """Every event, and how many lines are not JSON: a killed process may leave one."""
    events, torn = [], 0
    for raw in path.read_bytes().splitlines() if path.exists() else ():
        try:
            events.append(json.loads(raw))
        except ValueError:
            torn += 1
    return events, torn


def read_json(path: Path) -> dict[str, Any]:
    """What the driver wrote there; nothing where it is not there yet or is being written."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(found, dict):
        raise IntegrityError(f"{path}: is no JSON object; delete it and submit the run's command again")
    return found


def time_of(event: dict) -> datetime.datetime:
    return datetime.datetime.fromisoformat(event["time"])


def pick(events: list[dict], *names: str) -> dict[str, Any] | None:
    """Fields of the last of `events`."""
    return {name: events[-1].get(name) for name in names} if events else None


def next_step(found: dict[str, Any], command: str) -> str:
    if found["state"] == "finished":
        return f"read {found['run']}/report.html"
    if found["state"] == "running":
        return "nothing: it is at work"
    if found["state"] == "unknown":
        return f"ask host {found['holder']['host']} whether process {found['holder']['pid']} is alive; if not: {command}"
    return command


def describe(found: dict[str, Any]) -> str:
    """A few lines for a person."""
    holder, last, stage = found["holder"] or {}, found["last_event"], found["stage"]
    who = f" (host {holder.get('host')}, process {holder.get('pid')}" if found["state"] != "finished" and holder else ""
    who += (f", job {holder['job']}" if holder.get("job") else "") + ")" if who else ""
    lines = [f"run        {found['name'] or '?'} in {found['run']}", f"state      {found['state']}{who}"]
    if last:
        lines += [f"last event {last['event']}, {duration(last['age_s'])} ago"]
    if stage:
        of = "" if found["iterations"] is None else f" of {found['iterations']}"
        where = "" if stage["iteration"] is None else f"iteration {stage['iteration']}{of}: "
        lines += [f"stage      {where}{stage['stage']}{progress(stage)}"]
    elif found["committed"]:
        number, names = max(found["committed"].items(), key=lambda item: int(item[0]))
        lines += [f"committed  iteration {number}: {', '.join(names)}"]
    if engine := found["engine"]:
        lines += [
            f"engines    {engine['num_tokens']:,} tokens generated, {engine['tokens_per_engine_s']:,} a second and engine, "
            f"{engine['cache_hit_rate']:.0%} of the prompts' tokens from the cache"
        ]
    lines += [
        f"rejected   iteration {row['iteration']}: {row['stage']}: {row['num_rejected']:,} of {row['num_in'] or '?'} rows"
        for row in found["rejected"]
    ]
    if decision := found["decision"]:
        lines += [f"decision   iteration {decision['iteration']}: {decision['action']}: {decision['reason']}"]
    if found["error"]:
        label = "error" if found["state"] == "failed" else "old error"
        lines += [f"{label:<10} {found['error']['error'].strip().splitlines()[0]}"]
    return "\n".join([*lines, f"next       {found['next']}"])


def progress(stage: dict[str, Any]) -> str:
    if training := stage["training"]:
        return f", step {training['step'] + 1} of {training['num_steps']}, loss {training['loss']:.4f}"
    if shards := stage["shards"]:
        of = f" of {shards['total']}" if shards["total"] else ""
        made = [f"{kind} {shards[kind]}{of} shards" for kind in ("generations", "scores") if kind in shards]
        return ", " + (", ".join(made) or f"no shard{of} yet")
    return ""


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
