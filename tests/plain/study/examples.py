"""Results of a study that were never run, and runs on disk with committed evaluations."""

import os

from evolve_ray.evaluate.figures import summarise
from evolve_ray.report import report as evolve_ray_report
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import commit
from evolve_ray.store.run import Run, Stage
from evolve_ray.study import claims as study_claims
from evolve_ray.study import driver
from evolve_ray.study.results import Answer, Outcomes, Result


def spread(counts, tokens=5):
    """The judge of these outcomes is never wrong: it likes right answers better."""
    patterns = [pattern for pattern, count in counts.items() for _ in range(count)]
    return {f"p{n:03}": [Answer(mark == "1", tokens, float(mark)) for mark in pattern] for n, pattern in enumerate(patterns)}


def outcomes(counts, parallel=None, tokens=5):
    return Outcomes(spread(counts, tokens), spread(parallel or {}))


def result(recipe, seed, models, labels=None):
    """Models by name: outcomes, or counts; the same on every split unless a dict of splits is given."""
    whole = {}
    for name, given in models.items():
        parts = given if set(given if isinstance(given, dict) else ()) >= {"heldout"} else dict.fromkeys(driver.SPLITS, given)
        whole[name] = {split: part if isinstance(part, Outcomes) else outcomes(part) for split, part in parts.items()}
    return Result(recipe, seed, whole, labels or {}, [])


def signs(better, equal, worse):
    return {f"pair{n}": sign for n, sign in enumerate([1] * better + [0] * equal + [-1] * worse)}


BASE, ACTIVATION = {"10": 30, "00": 70}, {"11": 40, "00": 60}
ONE, TWO = {"01": 20, "11": 40, "00": 40}, {"01": 20, "11": 50, "00": 30}
THREE, SAMPLES = {"01": 40, "11": 55, "00": 5}, {"10": 50, "00": 50}
ALL = (
    "a",
    "b",
    "c",
    "c_direct",
    "c_gain",
    "d",
    "e",
    "e_verifier",
    "e_tokens",
    "ood_long",
    "ood_desc",
    "rule_label_accuracy",
    "trained_reward_model",
)


def tiny(**changes):
    names = {"base": BASE, "activation": ACTIVATION, "iteration 1": ONE, "iteration 2": TWO}
    return names | {"iteration 3": outcomes(THREE, SAMPLES)} | changes


def results(*, drop=(), seeds=(0, 1), tiny=tiny(), dpo=ACTIVATION, labels=None, learned=ONE):  # noqa: B008
    found = []
    for seed in seeds:
        found += [result("tiny", seed, tiny), result("tiny_iterative_dpo", seed, {"base": BASE, "iteration 3": dpo})]
        found += [result("tiny_rule", seed, {"base": BASE}, labels or {1: signs(70, 10, 20), 2: signs(60, 0, 40)})]
        found += [result("tiny_reward_model", seed, {"activation": ACTIVATION, "iteration 2": learned})]
    return [part for part in found if part.recipe not in drop]


def claims(found, command="python jobs/study.py"):
    return {claim["claim"]: claim for claim in study_claims.claims(found, command)}


# --- run folders on disk, written as a run writes them --------------------------------------------------------------------------


def commit_table(folder, name, schema, table):
    """A committed stage of two shards, prompts kept together."""
    stage = Stage(folder / name, name, f"key of {folder.name}/{name}")
    stage.resume()
    blank = dict.fromkeys(schema.names)
    ids = sorted({row["prompt_id"] for row in table})
    for shard in range(2):
        aside = stage.work / f".{shard}"
        aside.mkdir()
        here = [blank | row for row in table if row["prompt_id"] in ids[shard::2]]
        rows.write_table(aside / "rows.parquet", here, schema)
        rows.write_jsonl(aside / "rejected.jsonl", [])
        tokens = sum(row.get("num_tokens", 0) for row in here)
        commit(aside, stage.work / shards.shard_name(shard), stage="shard", key="k", num_in=1, num_tokens=tokens)
    return shards.finish(stage, 2, 2)


def commit_answers(folder, marks, column="round"):
    """Drafts and scores from {split: [marks of a prompt]}; `1` right, `0` wrong, `?` without a score."""
    drafts, scores = [], []
    for split, prompts in marks.items():
        for place, pattern in enumerate(prompts):
            for number, mark in enumerate(pattern):
                draft_id, prompt_id = f"{split}-{place}-{number}", f"{split}-{place}"
                position = {"sample": 0, "round": 1, column: number + (column == "round")}
                text = {"split": split, "text": f"y{mark}", "num_tokens": 3 + number, "finish_reason": "stop"}
                drafts.append({"draft_id": draft_id, "prompt_id": prompt_id, **position, **text})
                if mark != "?":
                    right = {"1": 1.0, "0": 0.75}[mark]
                    scores.append({"draft_id": draft_id, "prompt_id": prompt_id, "score": right, "correct": right})
    # Order on disk means nothing.
    return [
        commit_table(folder, "generations", rows.GENERATION, drafts[::-1]),
        commit_table(folder, "scores", rows.SCORE, scores),
    ]


def commit_evaluation(folder, marks, parallel=None):
    stage = Stage(folder, "evaluation", f"key of {folder.name}")
    made = [list(shards.read_rows(manifest)) for manifest in commit_answers(stage.work, marks)]
    if parallel:
        commit_answers(stage.work / "parallel", parallel, "sample")
    stage.commit([], num_in=1, num_rows=1, num_tokens=100)
    prompts = [{"prompt_id": f"{split}-{n}", "split": split} for split, part in marks.items() for n in range(len(part))]
    return summarise(prompts, *made)


def commit_pairs(folder, correct):
    """An iteration's pairs from [(truth of the chosen, truth of the rejected)], None where the verifier said nothing."""
    scores, pairs = [], []
    for place, truths in enumerate(correct):
        ids = [f"d{place}-{side}" for side in (0, 1)]
        pairs.append({"pair_id": f"pair{place}", "prompt_id": "p", "chosen_id": ids[0], "rejected_id": ids[1]})
        for draft_id, truth in zip(ids, truths, strict=True):
            scores.append({"draft_id": draft_id, "prompt_id": f"p{place % 2}", "score": 0.0, "correct": truth})
    commit_table(folder, "scores", rows.SCORE, scores)
    stage = Stage(folder / "pairs", "pairs", "key of pairs")
    table = [dict.fromkeys(rows.PAIR.names) | pair for pair in pairs]
    rows.write_table(stage.start() / "pairs.parquet", table, rows.PAIR)
    stage.commit([], num_in=len(pairs), num_rows=len(pairs))


MARKS = {"base": ["10", "00", "10", "00"], "activation": ["11", "00", "10", "00"], "iteration 1": ["11", "01", "01", "00"]}


def write_run(root, *, marks=MARKS, parallel=None, truths=((1.0, 0.5),), end="driver_end", seconds=2.0):
    """A run folder as a finished run leaves it; stages of iteration 0 that are there already are kept."""
    run, models = Run(root), []
    root.mkdir(parents=True, exist_ok=True)
    run.event("driver_start")
    for name, given in marks.items():
        number = int(name.split()[-1]) if name.startswith("iteration") else 0
        folder = run.iteration(number)
        given = given if isinstance(given, dict) else dict.fromkeys(driver.SPLITS, given)
        evaluation = "base_evaluation" if name == "base" else "evaluation"
        summary = {}
        if not (folder / evaluation).exists():
            summary = commit_evaluation(folder / evaluation, given, parallel)
            run.event("stage_end", iteration=number, stage=evaluation, seconds=seconds)
        if name == "activation" and not (folder / "checkpoint").exists():
            stage = Stage(folder / "checkpoint", "checkpoint", "key of checkpoint")
            (stage.start() / "model.safetensors").write_bytes(os.urandom(8))
            stage.commit([])
        if number:
            commit_pairs(folder, truths)
        models.append({"name": name, "iteration": number, "model": "hash", "path": "path", "splits": summary})
    evolve_ray_report.write(run, {"name": root.name, "engine": {"actors": 2}}, models)
    run.event(end)
