"""Where the wall-clock time of each iteration went, in parts that do not overlap and sum to it.

An iteration lasts from the end of the one before to its own end; iteration 0 begins with the driver. Time between two drivers
does not count.
"""

import datetime
from collections import defaultdict
from typing import Any

PARTS = ("engines", "scoring", "updates", "starts", "waiting", "rest")
TITLES = {
    "engines": "engines",
    "scoring": "scoring",
    "updates": "reference and updates",
    "starts": "starts",
    "waiting": "waiting",
    "rest": "checks and commits",
}
Event = dict[str, Any]
Seconds = dict[str, float]


def clock(events: list[Event], lines: list[dict[str, Any]], actors: int) -> list[dict[str, Any]]:
    """Returns `{iteration, seconds, engines, scoring, updates, starts, waiting, rest}` of each iteration, in seconds.

    * `engines`: engines work; engines work side by side, so these are their seconds divided by `actors`;
    * `scoring`: drafts are scored after the last of them was generated (before that, scoring takes no time of its own);
    * `updates`: reference and optimiser updates;
    * `starts`: processes, imports, Ray, pipelines and worker groups start, models are loaded;
    * `waiting`: an engine or a scorer waits for another one;
    * `rest`: probe, pairs, drift, decision, export, commits, report.

    `lines` are those of the ledger's stages. Empty for a run whose shards were written without their times.
    """
    if any(event["event"] == "shard" and "steps" not in event for event in events):
        return []
    train_seconds = {(line["iteration"], line["stage"]): line["train_seconds"] or 0.0 for line in lines}
    totals: dict[int, Seconds] = defaultdict(lambda: dict.fromkeys(PARTS, 0.0))
    for driver in by_driver(events):
        last, stage, iteration = time_of(driver[0]), None, None
        inside: list[Event] = []
        for event in driver:
            if event["event"] == "stage_start" and stage is None:
                part = "rest" if iteration is not None else "starts"  # of the driver, up to its first stage
                iteration = event["iteration"] or 0
                totals[iteration][part] += seconds_between(last, time_of(event))
                stage, inside, last = event["stage"], [], time_of(event)
            elif event["event"] == "stage_end" and event["stage"] == stage:
                updates = train_seconds.get((iteration or 0, stage), 0.0)
                add(totals[iteration or 0], stage_parts(inside, last, time_of(event), updates, actors))
                stage, last = None, time_of(event)
            else:
                inside.append(event)
        end = time_of(driver[-1])
        killed = stage_parts(inside, last, end, 0.0, actors) if stage else {"rest": seconds_between(last, end)}
        add(totals[iteration or 0], killed)
    return [
        {"iteration": number, "seconds": round(sum(parts.values()), 3)} | {name: round(parts[name], 3) for name in PARTS}
        for number, parts in sorted(totals.items())
    ]


def by_driver(events: list[Event]) -> list[list[Event]]:
    """The events of each driver: from its start to its last event."""
    drivers: list[list[Event]] = []
    for event in events:
        if event["event"] == "driver_start" or not drivers:
            drivers.append([])
        drivers[-1].append(event)
    return drivers


def stage_parts(inside: list[Event], start: Any, end: Any, train_seconds: float, actors: int) -> Seconds:
    """The parts of a stage from its events: a training, a pipeline, or anything else."""
    seconds = seconds_between(start, end)
    loads = [event for event in inside if event["event"] in ("model_loaded", "prober_ready")]
    shards = [event["steps"] for event in inside if event["event"] == "shard"]
    if loads:
        starts = seconds_between(start, time_of(loads[0]))
        updates = min(train_seconds, seconds - starts)
        return {"starts": starts, "updates": updates, "rest": seconds - starts - updates}
    return pipeline_parts(shards, start, end, actors) if shards else {"rest": seconds}


def pipeline_parts(shards: list[dict[str, dict[str, Any]]], start: Any, end: Any, actors: int) -> Seconds:
    """The parts of a pipeline from the steps of its shards, each with `begun`, `ended` and its seconds of work."""
    drafted = [steps["generations"] for steps in shards if "generations" in steps]
    scored = [steps[name] for steps in shards for name in steps if name != "generations"]
    begun = min(time_of(step, "begun") for step in [*drafted, *scored])
    generated = max((time_of(step, "ended") for step in drafted), default=begun)
    done = max((time_of(step, "ended") for step in scored), default=generated)
    starts, engines, commits = seconds_between(start, begun), 0.0, 0.0
    for step in drafted:
        span = seconds_between(time_of(step, "begun"), time_of(step, "ended"))
        work, load = min(step["engine_seconds"], span), min(step.get("start_seconds", 0.0), span)
        other = max(0.0, span - work - load)
        engines += work / actors
        # An actor that starts its engine has started its process before.
        starts += (load + (other if load else 0.0)) / actors
        commits += (0.0 if load else other) / actors
    tail = seconds_between(generated, done)
    score_seconds = [step["score_seconds"] for step in scored if time_of(step, "ended") > generated]
    scoring = min(sum(score_seconds), tail)
    if scored:  # the first shard to be scored also waits for the process of its scorer
        first = min(scored, key=lambda step: time_of(step, "begun"))
        loading = seconds_between(time_of(first, "begun"), time_of(first, "ended")) - first["score_seconds"]
        starts += max(0.0, min(loading, tail - scoring))
    whole = seconds_between(start, end)
    after = seconds_between(done, end)
    waiting = max(0.0, whole - starts - engines - commits - scoring - after)
    return {"engines": engines, "scoring": scoring, "starts": starts, "waiting": waiting, "rest": commits + after}


def add(totals: Seconds, parts: Seconds) -> None:
    for name, seconds in parts.items():
        totals[name] += seconds


def time_of(event: Event, name: str = "time") -> datetime.datetime:
    return datetime.datetime.fromisoformat(event[name])


def seconds_between(start: datetime.datetime, end: datetime.datetime) -> float:
    return max(0.0, (end - start).total_seconds())
