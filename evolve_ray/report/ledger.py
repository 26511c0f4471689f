"""What a run cost: the ledger by stage and iteration, and quality against the tokens that it took."""

import datetime
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evolve_ray.store.manifest import Manifest, read_manifest
from evolve_ray.store.rows import read_jsonl
from evolve_ray.store.run import Run

TOKENS = ("num_prompt_tokens", "num_cached_tokens", "num_tokens")  # prompted, of these found in the prefix cache, generated

# Tokens that rounds left out would have taken, each as many as the draft before it; tokens that were guessed, and of these right.
SPARED = ("num_saved_tokens", "num_guessed_tokens", "num_accepted_tokens")
TOTALS = (*TOKENS, *SPARED, "num_engine_steps", "num_updates", "seconds", "engine_seconds", "start_seconds", "idle_seconds",
          "score_seconds", "train_seconds")  # fmt: skip


def committed_stages(run: Run) -> Iterator[tuple[int, Manifest]]:
    """(iteration, manifest) of every committed stage, by iteration and name."""
    for folder in sorted(run.root.glob("iteration-*")):
        for path in sorted(found.parent for found in folder.glob("[!.]*/MANIFEST.json")):
            manifest = read_manifest(path)
            assert manifest is not None
            yield int(folder.name.removeprefix("iteration-")), manifest


def ledger(run: Run, actors: int) -> dict[str, Any]:
    """`{"stages": a line per committed stage, "iterations": their totals by iteration, "total": those of the run}`.

    `seconds` is wall time over all attempts. The engine's own: `engine_seconds` at work and `start_seconds` (start, new
    weights), summed over `actors` engines; `idle_seconds` is what is left of actors x wall time, Ray's start included. Drafts
    and scores are made in one pipeline, whose wall time stands at the drafts; the reference's stands at its training.
    `num_engine_steps` are forwards of the engine, `num_updates` optimiser updates. `train_seconds` are those of a training's
    reference and updates, without the start of its workers and without its files. Null: a stage has no such figure.
    """
    seconds = wall_seconds(read_jsonl(run.root / "events.jsonl"))
    lines = [line(number, manifest, seconds, actors) for number, manifest in committed_stages(run)]
    iterations = [
        {"iteration": number, **totals([row for row in lines if row["iteration"] == number])}
        for number in dict.fromkeys(row["iteration"] for row in lines)
    ]
    return {"stages": lines, "iterations": iterations, "total": totals(lines)}


def line(iteration: int, manifest: Manifest, seconds: dict[tuple[int, str], float], actors: int) -> dict[str, Any]:
    """One stage's line; an evaluation's engine figures come from the stages inside it."""
    name = manifest.folder.name
    inside = [read_manifest(path.parent) for path in sorted(manifest.folder.glob("**/MANIFEST.json")) if is_stage(path)]
    parts = [part.stats for part in inside if part] if name.endswith("evaluation") else [manifest.stats]

    def added(key: str) -> float | None:
        found = [part[key] for part in parts if key in part]
        return round(sum(found), 3) if found else None

    wall = seconds[iteration, name]
    engine, start = added("engine_seconds"), added("start_seconds")
    return {
        "iteration": iteration,
        "stage": name,
        **{key: manifest.stats.get(key) for key in ("num_in", "num_rows", "num_rejected", *TOKENS)},
        **{key: added(key) for key in SPARED},
        "num_engine_steps": added("num_steps") if engine is not None else None,
        "num_updates": added("num_steps") if engine is None else None,
        "seconds": round(wall, 3),
        "engine_seconds": engine,
        "start_seconds": start,
        "idle_seconds": None if engine is None else round(max(0.0, actors * wall - engine - (start or 0.0)), 3),
        "score_seconds": added("score_seconds"),
        "train_seconds": added("train_seconds"),
    }


def is_stage(path: Path) -> bool:
    return path.parent.name in ("generations", "scores")


def totals(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of what is known; rows are not summed, since one stage's rows are the next one's input."""
    found = {key: [row[key] for row in lines if row[key] is not None] for key in TOTALS}
    return {key: round(sum(values), 3) for key, values in found.items()}


def wall_seconds(events: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """Seconds of each (iteration, stage) over all attempts; one that was killed lasted until the last event before the next."""
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    started: dict[tuple[int, str], datetime.datetime] = {}
    last: datetime.datetime | None = None

    def end_killed() -> None:
        for key, start in started.items():
            assert last is not None
            seconds[key] += (last - start).total_seconds()
        started.clear()

    for event in events:
        if event["event"] == "driver_start":
            end_killed()
        last = datetime.datetime.fromisoformat(event["time"])
        if event["event"] == "stage_start":
            started[event["iteration"], event["stage"]] = last
        elif event["event"] == "stage_end":
            seconds[event["iteration"], event["stage"]] += event["seconds"]
            started.pop((event["iteration"], event["stage"]), None)
    end_killed()
    return seconds


def compute(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Quality against compute, a line per model and split.

    `chain`: generated tokens per prompt up to and with round k, beside the reward and exact match of y_k. `best_of`: the
    scorer's best of `num_responses` of the chain and of as many parallel samples, beside all their tokens; `longer`:
    one direct answer that could have the tokens of all rounds, beside those that it used. Null: not sampled.
    """
    found = []
    for model in models:
        for split, summary in model["splits"].items():
            tokens, chain = 0.0, []
            for number in sorted(summary["rounds"], key=int):
                figures = summary["rounds"][number]
                tokens += figures["mean_response_tokens"]
                chain.append({"round": int(number), "mean_tokens": tokens, **quality(figures)})
            probed = summary.get("probes", {})
            best, longer = summary.get("best_of"), probed.get("longer", {}).get("answer")
            if probed.get("parallel", {}).get("n"):
                equal, size = probed["parallel"]["equal_samples"], len(summary["rounds"])
                best = {"num_responses": size, **{side: {**equal[side], **equal[side]["best"]} for side in ("chain", "parallel")}}
            sides = best and {
                side: {"mean_tokens": best[side]["mean_tokens"], **quality(best[side])} for side in ("chain", "parallel")
            }
            found.append(
                {
                    "model": model["name"],
                    "iteration": model["iteration"],
                    "split": split,
                    "chain": chain,
                    "best_of": {"num_responses": best["num_responses"], **sides} if sides else None,
                    "longer": {"mean_tokens": longer["mean_tokens"], **quality(longer)} if longer else None,
                }
            )
    return found


def quality(figures: dict[str, Any]) -> dict[str, Any]:
    return {measure: figures[measure] for measure in ("reward", "exact_match") if measure in figures}
