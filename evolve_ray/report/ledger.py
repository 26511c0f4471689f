"""What a run cost: the ledger by stage and iteration, and quality against generated tokens."""

import datetime
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evolve_ray.report.clock import clock
from evolve_ray.store.manifest import Manifest, read_manifest
from evolve_ray.store.rows import mixture_text, read_jsonl
from evolve_ray.store.run import Run

TOKENS = ("num_prompt_tokens", "num_cached_tokens", "num_tokens")  # of prompts, of these in the prefix cache, generated

# Tokens of skipped rounds (each is counted as long as the draft before it); speculative tokens, and how many were accepted;
# tokens of thinking among the generated ones, responses that ended inside it, and responses with a token that has no text;
# of a judge: questions, replies that cannot be read, refused ones, tokens that it wrote and that it read.
SOMETIMES = ("num_saved_tokens", "num_guessed_tokens", "num_accepted_tokens", "num_thinking_tokens", "num_without_answer",
             "num_broken", "num_judge_asks", "num_unparsable", "num_refused", "num_judge_tokens",
             "num_judge_prompt_tokens")  # fmt: skip
TOTALS = (*TOKENS, *SOMETIMES, "num_engine_steps", "num_updates", "seconds", "engine_seconds", "start_seconds", "idle_seconds",
          "score_seconds", "train_seconds")  # fmt: skip


def committed_stages(run: Run) -> Iterator[tuple[int, Manifest]]:
    """(iteration, manifest) of every committed stage, by iteration and name."""
    for folder in sorted(run.root.glob("iteration-*")):
        for stage in sorted(path.parent for path in folder.glob("[!.]*/MANIFEST.json")):
            manifest = read_manifest(stage)
            assert manifest is not None
            yield int(folder.name.removeprefix("iteration-")), manifest


def ledger(run: Run, actors: int) -> dict[str, Any]:
    """`{"stages": a line per committed stage, "iterations": totals by iteration, "total": totals of the run, "clock": where
    the wall-clock time of each iteration went (`clock.py`)}`.

    `seconds` is wall time over all attempts. Drafts and scores come from one pipeline, whose wall time is in the line of the
    drafts; the wall time of a reference is in the line of its training.
    `engine_seconds` (work) and `start_seconds` (start, loading weights) are summed over the `actors` engines. `idle_seconds` is
    actors x wall time minus both, so it includes the start of Ray.
    `num_engine_steps` counts forwards of the engine, `num_updates` optimiser updates. `train_seconds` is the time of a
    training's reference and updates, without the start of its workers and without reading and writing files.
    Null: the stage has no such figure.
    """
    events = read_jsonl(run.root / "events.jsonl")
    seconds = wall_seconds(events)
    lines = [line(number, manifest, seconds, actors) for number, manifest in committed_stages(run)]
    iterations = [
        {"iteration": number, **totals([row for row in lines if row["iteration"] == number])}
        for number in dict.fromkeys(row["iteration"] for row in lines)
    ]
    return {"stages": lines, "iterations": iterations, "total": totals(lines), "clock": clock(events, lines, actors)}


def line(iteration: int, manifest: Manifest, seconds: dict[tuple[int, str], float], actors: int) -> dict[str, Any]:
    """The line of one stage; the engine figures of an evaluation are sums over the stages inside it."""
    name = manifest.folder.name
    inside = [read_manifest(path.parent) for path in sorted(manifest.folder.glob("**/MANIFEST.json")) if is_stage(path)]
    parts = [part.stats for part in inside if part] if name.endswith("evaluation") else [manifest.stats]

    def sum_of(key: str) -> float | None:
        values = [part[key] for part in parts if key in part]
        return round(sum(values), 3) if values else None

    wall = seconds[iteration, name]
    engine, start = sum_of("engine_seconds"), sum_of("start_seconds")
    return {
        "iteration": iteration,
        "stage": name,
        **{key: manifest.stats.get(key) for key in ("num_in", "num_rows", "num_rejected", *TOKENS)},
        **{key: sum_of(key) for key in SOMETIMES},
        "num_engine_steps": sum_of("num_steps") if engine is not None else None,
        "num_updates": sum_of("num_steps") if engine is None else None,
        "seconds": round(wall, 3),
        "engine_seconds": engine,
        "start_seconds": start,
        "idle_seconds": None if engine is None else round(max(0.0, actors * wall - engine - (start or 0.0)), 3),
        "score_seconds": sum_of("score_seconds"),
        "train_seconds": sum_of("train_seconds"),
        **({"by_model": counts} if (counts := by_model(parts)) else {}),
        **({"mixture": mixture_text(manifest.stats)} if manifest.stage == "mixed" else {}),
    }


def by_model(parts: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What further models were asked, by their names: `num_asks`, `num_prompt_tokens`, `num_tokens`, `engine_seconds`, ..."""
    found: dict[str, dict[str, float]] = {}
    for key, value in (item for part in parts for item in part.items()):
        what, of, name = key.partition("_of_")
        if of:
            counts = found.setdefault(name, {})
            counts[what] = round(counts.get(what, 0) + value, 3)
    return found


def is_stage(path: Path) -> bool:
    return path.parent.name in ("generations", "scores")


def totals(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the lines that have a figure. Rows are not summed, since the rows of one stage are the input of the next."""
    values_of = {key: [row[key] for row in lines if row[key] is not None] for key in TOTALS}
    return {key: round(sum(values), 3) for key, values in values_of.items()}


def wall_seconds(events: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """Seconds of each (iteration, stage) over all attempts; a killed attempt ends at the last event before the next driver."""
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

    `chain`: for each round k, the generated tokens per prompt of rounds 1 to k, and the reward and exact match of y_k.
    `best_of`: the scorer's best of `num_responses` responses of the chain, and of the same number of parallel samples, each
    with the tokens of all these responses. `longer`: one direct answer with the token limit of all rounds together, and the
    tokens that it used. Null: not sampled.
    """
    lines = []
    for model in models:
        for split, summary in model["splits"].items():
            tokens, chain = 0.0, []
            for number in sorted(summary["rounds"], key=int):
                figures = summary["rounds"][number]
                tokens += figures["mean_response_tokens"]
                chain.append({"round": int(number), "mean_tokens": tokens, **quality(figures)})
            probes = summary.get("probes", {})
            best, longer = summary.get("best_of"), probes.get("longer", {}).get("answer")
            if probes.get("parallel", {}).get("n"):
                equal, size = probes["parallel"]["equal_samples"], len(summary["rounds"])
                best = {"num_responses": size, **{side: {**equal[side], **equal[side]["best"]} for side in ("chain", "parallel")}}
            sides = best and {
                side: {"mean_tokens": best[side]["mean_tokens"], **quality(best[side])} for side in ("chain", "parallel")
            }
            lines.append(
                {
                    "model": model["name"],
                    "iteration": model["iteration"],
                    "split": split,
                    "chain": chain,
                    "best_of": {"num_responses": best["num_responses"], **sides} if sides else None,
                    "longer": {"mean_tokens": longer["mean_tokens"], **quality(longer)} if longer else None,
                }
            )
    return lines


def quality(figures: dict[str, Any]) -> dict[str, Any]:
    return {measure: figures[measure] for measure in ("reward", "exact_match") if measure in figures}
