"""A run directory with committed evaluations, without any engine: what a report's page and comparisons are made from."""

from pathlib import Path
from typing import Any

from evolve_ray.evaluate.figures import add_best_of, summarise
from evolve_ray.report import report
from evolve_ray.store import rows
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Run, Stage

# What a page must show as text and never obey.
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror=\"window.hacked = 1\"><svg onload='window.hacked = 1'><circle r=9></svg>",
    "</pre></details></body><iframe src=\"javascript:parent.hacked = 1\"></iframe><a href='javascript:hacked = 1'>x</a>",
    "<style>body{display:none}</style><meta http-equiv=refresh content='0;url=https://example.com/'>",
    "\u202e\x00\x1b[31m]]>--><!-- <math><mtext></math> &lt;b&gt; $\\frac{1}{0}$",
)
Answer = tuple[str, float, float | None]  # text, score, the verifier's value


def make_run(
    root: Path,
    answers: dict[str, dict[str, dict[str, list[Answer]]]],
    *,
    config: dict[str, Any] | None = None,
    parallel: bool = True,
) -> Run:
    """`answers`: {model: {split: {prompt: [y1, y2, ...]}}}; models named "base", "activation" or "iteration N"."""
    run = Run(root)
    run.root.mkdir(parents=True, exist_ok=True)
    splits = next(iter(answers.values()))
    prompts = [
        {
            "prompt_id": rows.content_id(split, prompt), "prompt": prompt, "answer": "the answer", "split": split,
            "file": str(root / "held.jsonl"), "line": line, "num_tokens": 3,
        }
        for split, found in splits.items() for line, prompt in enumerate(found, start=1)
    ]  # fmt: skip
    held_out = Stage(run.iteration(0) / "held_out", "prompts", "key")
    rows.write_table(held_out.start() / "prompts.parquet", prompts, rows.PROMPT)
    held_out.commit(num_in=len(prompts), num_rows=len(prompts))
    models = []
    for name, by_split in answers.items():
        iteration = int(name.removeprefix("iteration ")) if name.startswith("iteration ") else 0
        folder = run.iteration(iteration) / ("base_evaluation" if name == "base" else "evaluation")
        drafts, scores = tables(by_split)
        commit(folder / "generations", drafts, rows.GENERATION)
        commit(folder / "scores", scores, rows.SCORE)
        summary = summarise(prompts, drafts, scores)
        if parallel:
            samples = [{**draft, "sample": draft["round"] - 1} for draft in drafts]
            add_best_of(summary, (drafts, scores), (samples, scores))
        probe = {"kl_iteration": 0.1, "kl_initial": 0.2 * iteration} if iteration else None
        models.append({"name": name, "iteration": iteration, "path": f"/run/{name}", "splits": summary, "probe": probe})
    for name in ("driver_start", "driver_end"):
        run.event(name)
    report.write(run, {"name": root.name, "engine": {"actors": 1}, **(config or {})}, models)
    return run


def tables(by_split: dict[str, dict[str, list[Answer]]]) -> tuple[list[dict], list[dict]]:
    drafts, scores = [], []
    for split, chains in by_split.items():
        for prompt, chain in chains.items():
            prompt_id = rows.content_id(split, prompt)
            for number, (text, score, correct) in enumerate(chain, start=1):
                draft_id = rows.content_id(prompt_id, number)
                drafts.append(
                    {
                        "draft_id": draft_id, "prompt_id": prompt_id, "split": split, "sample": 0, "round": number,
                        "kind": "answer", "parent_id": None, "text": text,
                        "finish_reason": "length" if text.endswith("-") else "stop", "num_prompt_tokens": 3,
                        "num_tokens": len(text), "seed": 1, "model": "m",
                    }
                )  # fmt: skip
                scores.append({"draft_id": draft_id, "prompt_id": prompt_id, "score": score, "correct": correct})
    return drafts, scores


def commit(folder: Path, table: list[dict], schema: Any) -> Manifest:
    """One committed stage with one shard."""
    stage = Stage(folder, folder.name, "key")
    shard = stage.start() / "shard-00000"
    shard.mkdir()
    rows.write_table(shard / "rows.parquet", table, schema)
    return stage.commit(num_in=len(table), num_rows=len(table), num_shards=1)


def chains(right: list[list[int]], tag: str = "", texts: list[str] | None = None) -> dict[str, list[Answer]]:
    """A chain for each prompt: 1 is a right answer of score 1, 0 a wrong one of score 0; `texts` replace the prompts' words."""
    words = texts or [f"question {place}" for place in range(len(right))]
    return {
        word: [(f"{tag}answer {place} {value}", float(value), float(value)) for value in chain]
        for place, (word, chain) in enumerate(zip(words, right, strict=True))
    }
