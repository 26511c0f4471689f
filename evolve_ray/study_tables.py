"""What the runs of a study say together: outcomes by prompt, intervals over seeds, tables in Markdown, the figure."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evolve_ray.errors import IntegrityError
from evolve_ray.evaluate.intervals import RESAMPLES
from evolve_ray.markup import cell
from evolve_ray.store import shards
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.rows import read_table
from evolve_ray.store.run import Run

Values = dict[str, float]  # one number by prompt id (or pair id)


class Answer(NamedTuple):
    right: bool
    num_tokens: int
    judged: float | None = None  # what the trained reward model gives; None: it was not asked


@dataclass(frozen=True)
class Outcomes:
    """One model on one split: the answers of each prompt. Only prompts with a verified answer in every round count."""

    chain: dict[str, list[Answer]]  # y1 first
    parallel: dict[str, list[Answer]]  # as many independent samples as the chain has rounds; empty: not measured

    @property
    def rounds(self) -> int:
        return len(next(iter(self.chain.values())))

    def y(self, number: int) -> Values:
        """1.0 where the answer of a round is right; rounds count from 1, and -1 is the last."""
        return {key: float(answers[number - (number > 0)].right) for key, answers in self.chain.items()}

    def best(self, kind: str) -> Values:
        """1.0 where any answer of the `chain` or of the `parallel` samples is right."""
        return {key: float(any(answer.right for answer in answers)) for key, answers in getattr(self, kind).items()}

    def picked(self, kind: str) -> Values:
        """1.0 where the answer that the reward model likes best (of equal ones the first) is right; of prompts that it judged."""
        judged = {
            key: [(answer.judged, answer.right) for answer in answers if answer.judged is not None]
            for key, answers in getattr(self, kind).items()
        }
        return {key: float(max(found, key=lambda one: one[0])[1]) for key, found in judged.items() if len(found) == self.rounds}

    def tokens(self, kind: str) -> Values:
        return {key: float(sum(answer.num_tokens for answer in answers)) for key, answers in getattr(self, kind).items()}


@dataclass(frozen=True)
class Result:
    """One finished run of the study."""

    recipe: str
    seed: int
    models: dict[str, dict[str, Outcomes]]  # by model and split, models in the order in which they were made
    labels: dict[int, dict[str, int]]  # by iteration and pair: 1 if the chosen draft is truly better, 0 equal, -1 worse
    stages: list[dict[str, Any]]  # as in report.json

    def outcomes(self, model: str, split: str = "heldout") -> Outcomes:
        """Of a model by its name in the report, or of the `last` one."""
        return self.models[list(self.models)[-1] if model == "last" else model][split]


def minus(values: Values, others: Values) -> Values:
    """Differences, paired by prompt."""
    common = values.keys() & others.keys()
    if not common:
        raise IntegrityError(
            "two runs of a seed have no held-out prompt in common; delete the seed's folder and run the study again"
        )
    return {key: values[key] - others[key] for key in sorted(common)}


def gain(outcomes: Outcomes) -> Values:
    return minus(outcomes.y(-1), outcomes.y(1))


def share(signs: dict[str, int], wanted: int) -> Values:
    """1.0 for each pair whose label is the `wanted` one."""
    return {key: float(sign == wanted) for key, sign in signs.items()}


def pooled(strata: list[Values]) -> dict[str, float]:
    """The mean over seeds of their means, with its 95 % percentile bootstrap interval (2,000 resamples, seeded).

    Prompts are resampled within each seed (stratum), and the seeds averaged with equal weights. So the interval speaks of
    these very pipelines on other prompts; how far another seed may be from them, the per-seed values show. Drawing n values
    with replacement is one multinomial draw over the distinct values.
    """
    generator = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for values in strata:
        distinct, counts = np.unique(np.array(list(values.values()), dtype=np.float64), return_counts=True)
        means += generator.multinomial(len(values), counts / len(values), size=RESAMPLES) @ distinct / len(values)
    low, high = np.percentile(means / len(strata), [2.5, 97.5])
    mean = float(np.mean([sum(values.values()) / len(values) for values in strata]))
    return {"mean": mean, "low": float(low), "high": float(high)}


def read_result(root: Path, recipe: str, seed: int, judged: dict[str, float] | None = None) -> Result:
    """`judged`: the reward model's scores by draft id."""
    run = Run(root)
    report = json.loads((root / "report.json").read_bytes())
    models, labels = {}, {}
    for model in report["models"]:
        if model.get("rolled_back"):  # its training is not what the run ended with
            continue
        folder = run.iteration(model["iteration"])
        models[model["name"]] = read_outcomes(
            folder / ("base_evaluation" if model["name"] == "base" else "evaluation"), judged or {}
        )
        if model["iteration"]:
            labels[model["iteration"]] = read_labels(folder)
    return Result(recipe, seed, models, labels, report["stages"])


def read_outcomes(folder: Path, judged: dict[str, float]) -> dict[str, Outcomes]:
    """By split, from an evaluation's tables."""
    chains = read_answers(folder, "round", judged)
    parallels = read_answers(folder / "parallel", "sample", judged)
    found = {}
    for split, chain in chains.items():
        rounds = max(max(answers) for answers in chain.values())
        whole = every(chain, range(1, rounds + 1))
        if not whole:
            raise IntegrityError(
                f"{folder}: no prompt of split {split} has a verified answer in every round; see its rejected.jsonl"
            )
        found[split] = Outcomes(whole, every(parallels.get(split, {}), range(rounds)))
    if not found:
        raise IntegrityError(f"{folder}: is listed in report.json but holds no answers; delete the run and run the study again")
    return found


def every(answers: dict[str, dict[int, Answer | None]], numbers: range) -> dict[str, list[Answer]]:
    """The prompts that have a verified answer at each of `numbers`, with those answers."""
    found = {}
    for key, by_number in answers.items():
        present = [answer for number in numbers if (answer := by_number.get(number)) is not None]
        if len(present) == len(numbers):
            found[key] = present
    return found


def read_answers(folder: Path, column: str, judged: dict[str, float]) -> dict[str, dict[str, dict[int, Answer | None]]]:
    """By split, prompt and `column`; None for an answer without a verifier's value."""
    drafts, scores = read_manifest(folder / "generations"), read_manifest(folder / "scores")
    found: dict[str, dict[str, dict[int, Answer | None]]] = defaultdict(lambda: defaultdict(dict))
    if drafts and scores:
        correct = {row["draft_id"]: row["correct"] for row in shards.read_rows(scores)}
        for row in shards.read_rows(drafts):
            value = correct.get(row["draft_id"])
            answer = None if value is None else Answer(value == 1.0, row["num_tokens"], judged.get(row["draft_id"]))
            found[row["split"]][row["prompt_id"]][row[column]] = answer
    return found


def read_labels(folder: Path) -> dict[str, int]:
    """Of an iteration's pairs, those of which the verifier knows both drafts; see `Result.labels`."""
    pairs, scores = read_manifest(folder / "pairs"), read_manifest(folder / "scores")
    if not (pairs and scores):
        return {}
    correct = {row["draft_id"]: row["correct"] for row in shards.read_rows(scores) if row["correct"] is not None}
    return {
        pair["pair_id"]: int(np.sign(correct[pair["chosen_id"]] - correct[pair["rejected_id"]]))
        for pair in read_table(pairs.path("pairs.parquet"))
        if pair["chosen_id"] in correct and pair["rejected_id"] in correct
    }


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def grouped(results: list[Result]) -> list[tuple[str, str, list[Result]]]:
    """(recipe, model, runs that have it), in the order of recipes and models."""
    names = dict.fromkeys((result.recipe, model) for result in results for model in result.models)
    return [(r, m, [result for result in results if result.recipe == r and m in result.models]) for r, m in names]


def percent(values: list[Values]) -> str:
    return f"{100 * np.mean([sum(part.values()) / len(part) for part in values]):.1f}"


def round_cells(outcomes: list[Outcomes], rounds: int) -> list[str]:
    """y1 to yR in %, the gain with its interval, and how many answers the last round made right and wrong, by seed."""
    own = min(part.rounds for part in outcomes)
    gains = [gain(part) for part in outcomes]
    cells = [percent([part.y(number) for part in outcomes]) if number <= own else "" for number in range(1, rounds + 1)]
    moved = [np.mean([sum(value == sign for value in part.values()) for part in gains]) for sign in (1.0, -1.0)]
    sizes = f"{np.mean([len(part) for part in gains]):.0f}"
    return [*cells, cell(pooled(gains), 100.0), *(f"{count:.1f}".removesuffix(".0") for count in moved), sizes]


def exact_match_tables(results: list[Result], split: str) -> str:
    rounds = max(model[split].rounds for result in results for model in result.models.values())
    header = [
        *(f"y{number}" for number in range(1, rounds + 1)),
        f"y{rounds} - y1",
        "wrong to right",
        "right to wrong",
        "prompts",
    ]
    mean, each = [], []
    for recipe, model, having in grouped(results):
        outcomes = [result.outcomes(model, split) for result in having]
        mean.append([recipe, model, *round_cells(outcomes, rounds)])
        each += [[str(r.seed), recipe, model, *round_cells([o], rounds)] for r, o in zip(having, outcomes, strict=True)]
    each.sort(key=lambda line: int(line[0]))
    return (
        f"### {split}: mean over seeds\n\n{markdown(['recipe', 'model', *header], mean)}\n\n"
        f"### {split}: each seed\n\n{markdown(['seed', 'recipe', 'model', *header], each)}"
    )


def best_table(results: list[Result]) -> str:
    """Best of the chain against best of as many parallel samples, by who picks: the verifier, or the trained reward model."""
    lines = []
    for split in dict.fromkeys(split for result in results for model in result.models.values() for split in model):
        for recipe, model, having in grouped(results):
            outcomes = [o for result in having if (o := result.outcomes(model, split)).parallel]
            for picker, best in (("verifier", Outcomes.best), ("reward model", Outcomes.picked)):
                values = {kind: [best(part, kind) for part in outcomes] for kind in ("chain", "parallel")}
                if outcomes and all(part for side in values.values() for part in side):
                    difference = pooled([minus(*both) for both in zip(*values.values(), strict=True)])
                    tokens = [pooled([part.tokens(kind) for part in outcomes])["mean"] for kind in values]
                    cells = [*(percent(side) for side in values.values()), cell(difference, 100.0), *(f"{n:.1f}" for n in tokens)]
                    lines.append([split, recipe, model, picker, str(outcomes[0].rounds), *cells])
    header = ["split", "recipe", "model", "picked by", "samples", "best of chain", "best of parallel", "difference"]
    header += ["tokens of chain", "tokens of parallel"]
    return markdown(header, lines) if lines else "Not measured: `evaluation.parallel` is below the rounds of the chain."


def label_table(results: list[Result]) -> str:
    lines = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        for iteration in sorted({number for result in results if result.recipe == recipe for number in result.labels}):
            having = [labels for r in results if r.recipe == recipe and (labels := r.labels.get(iteration))]
            shares = [cell(pooled([share(part, wanted) for part in having]), 100.0) for wanted in (1, 0, -1) if having]
            size = f"{np.mean([len(part) for part in having]):.0f}" if having else "0"
            lines.append([recipe, str(iteration), size, *(shares or [""] * 3)])
    return markdown(["recipe", "iteration", "pairs", "chosen truly better %", "equal %", "worse %"], lines)


def compute_table(results: list[Result]) -> str:
    """Seconds and generated tokens of a run, mean over seeds."""
    kinds = dict.fromkeys(line["stage"] for result in results for line in result.stages if line["iteration"] and line["seconds"])
    lines = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        having = [result.stages for result in results if result.recipe == recipe]
        seconds: dict[str, float] = defaultdict(float)
        tokens: dict[str, float] = defaultdict(float)
        for line in (line for stages in having for line in stages):
            seconds[line["stage"] if line["iteration"] else "iteration 0"] += line["seconds"] / len(having)
            if line["iteration"]:
                tokens[line["stage"]] += line.get("num_tokens", 0) / len(having)
        cells = [f"{seconds[kind]:.0f}" for kind in ("iteration 0", *kinds)]
        generated = [f"{tokens[kind]:,.0f}" for kind in ("generations", "evaluation")]
        lines.append([recipe, *cells, f"{sum(seconds.values()):.0f}", *generated])
    return markdown(
        ["recipe", "iteration 0 s", *(f"{kind} s" for kind in kinds), "all s", "tokens drafted", "tokens in evaluation"], lines
    )


def claim_table(claims: list[dict[str, Any]]) -> str:
    lines = []
    for claim in claims:
        reached = {True: "yes", False: "**no**", None: claim.get("note", "")}[claim["reached"]]
        figures = [shown(claim), ", ".join(f"{seed}: {shown(figures)}" for seed, figures in claim["per_seed"].items())]
        lines.append([claim["claim"], claim["statement"], reached, *figures, claim["unit"]])
    return markdown(["claim", "statement", "reached", "effect", "by seed", "unit"], lines)


def shown(figures: dict[str, Any]) -> str:
    if figures["effect"] is None:
        return ""
    return f"{figures['effect']:.1f} [{figures['interval'][0]:.1f}, {figures['interval'][1]:.1f}]"


def study_page(results: list[Result], claims: list[dict[str, Any]], command: str) -> str:
    """STUDY.md: the claims, then the tables that they rest on."""
    seeds = ", ".join(str(seed) for seed in sorted({result.seed for result in results}))
    splits = dict.fromkeys(split for result in results for model in result.models.values() for split in model)
    parts = [
        "# Study on the tiny world",
        f"`{command}`; seeds {seeds}, each a whole pipeline with a base model of its own.",
        "Exact match in % on held-out prompts; y1 is the direct answer. Brackets: 95 % bootstrap intervals, paired by prompt; "
        "prompts are resampled within each seed and the seeds averaged, so the variation between seeds is not in them but in "
        "the lines by seed.",
        "## Claims",
        claim_table(claims),
        "## Exact match by round",
        *(exact_match_tables(results, split) for split in splits),
        "## Best of the chain against the best of as many parallel samples",
        "Tokens are generated ones, per prompt.",
        best_table(results),
        "## What selection calls better",
        "Pairs of one run; shares by the verifier, which the selection itself may not see.",
        label_table(results),
        "## Compute",
        "Of one run, mean over seeds. Runs of a seed share what is alike in iteration 0; its seconds are with the run that "
        "computed it. Scoring overlaps with generation and is timed with it.",
        compute_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def figure(results: list[Result], path: Path) -> None:
    """Exact match by round on held-out prompts, EVOLVE beside iterative DPO; bars are the intervals of `pooled`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"tiny": "EVOLVE", "tiny_iterative_dpo": "iterative DPO"}
    lines = [line for line in grouped(results) if line[0] in panels]
    having = [recipe for recipe in panels if any(line[0] == recipe for line in lines)]
    if not having:
        return
    names = list(dict.fromkeys(model for _, model, _ in lines))
    shades = pyplot.get_cmap("viridis")(np.linspace(0.1, 0.85, len(names)))
    colors = dict(zip(names, shades, strict=True)) | {"base": "0.6", "activation": "0.25"}
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "evolve-ray"}):
        drawing, (axes,) = pyplot.subplots(1, len(having), figsize=(4.2 * len(having), 3.6), sharey=True, squeeze=False)
        drawn: dict[str, Any] = {}
        for recipe, model, runs in lines:
            outcomes = [result.outcomes(model) for result in runs]
            rounds = range(1, min(part.rounds for part in outcomes) + 1)
            figures = [pooled([part.y(number) for part in outcomes]) for number in rounds]
            means, low, high = (np.array([100 * part[name] for part in figures]) for name in ("mean", "low", "high"))
            axis, bars = axes[having.index(recipe)], np.maximum([means - low, high - means], 0.0)
            drawn[model] = axis.errorbar(rounds, means, yerr=bars, color=colors[model], marker="o", capsize=3)
            axis.set_xticks(rounds, [f"y{number}" for number in rounds])
            axis.set_title(panels[recipe])
        axes[0].set_ylim(0, 100)
        axes[0].set_ylabel("exact match, %")
        axes[-1].legend(drawn.values(), drawn, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        drawing.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(drawing)
