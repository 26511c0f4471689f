"""STUDY.md and the figure of a study: tables in Markdown, with means over seeds and their intervals."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from evolve_ray.config.run_options import MIN_PROMPTS
from evolve_ray.report.markup import cell
from evolve_ray.study.results import Outcomes, Result, Values, gain, grouped, minus, pooled, pooled_gain, share


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def percent(values: list[Values]) -> str:
    return f"{100 * np.mean([sum(part.values()) / len(part) for part in values]):.1f}"


def round_cells(outcomes: list[Outcomes], rounds: int) -> list[str]:
    """y1 to yR in %, the gain with its interval, how many answers became right and wrong (mean over seeds), and the prompts."""
    available = min(part.rounds for part in outcomes)
    gains = [gain(part) for part in outcomes]
    cells = [percent([part.y(number) for part in outcomes]) if number <= available else "" for number in range(1, rounds + 1)]
    changes = [np.mean([sum(value == sign for value in part.values()) for part in gains]) for sign in (1.0, -1.0)]
    size = f"{np.mean([len(part) for part in gains]):.0f}"
    return [*cells, cell(pooled_gain(gains), 100.0), *(f"{count:.1f}".removesuffix(".0") for count in changes), size]


def exact_match_tables(results: list[Result], split: str) -> str:
    rounds = max(model[split].rounds for result in results for model in result.models.values())
    header = [
        *(f"y{number}" for number in range(1, rounds + 1)),
        f"y{rounds} - y1",
        "wrong to right",
        "right to wrong",
        "prompts",
    ]
    means, by_seed = [], []
    for recipe, model, runs in grouped(results):
        outcomes = [result.outcomes(model, split) for result in runs]
        means.append([recipe, model, *round_cells(outcomes, rounds)])
        by_seed += [[str(r.seed), recipe, model, *round_cells([o], rounds)] for r, o in zip(runs, outcomes, strict=True)]
    by_seed.sort(key=lambda line: int(line[0]))
    return (
        f"### {split}: mean over seeds\n\n{markdown(['recipe', 'model', *header], means)}\n\n"
        f"### {split}: each seed\n\n{markdown(['seed', 'recipe', 'model', *header], by_seed)}"
    )


def best_table(results: list[Result]) -> str:
    """The best of a chain against the best of the same number of parallel samples, picked by the verifier or a reward model."""
    lines = []
    for split in dict.fromkeys(split for result in results for model in result.models.values() for split in model):
        for recipe, model, runs in grouped(results):
            outcomes = [o for result in runs if (o := result.outcomes(model, split)).parallel]
            for picker, best in (("verifier", Outcomes.best), ("reward model", Outcomes.picked)):
                values = {kind: [best(part, kind) for part in outcomes] for kind in ("chain", "parallel")}
                if outcomes and all(part for side in values.values() for part in side):
                    difference = pooled_gain([minus(*both) for both in zip(*values.values(), strict=True)])
                    tokens = [pooled([part.tokens(kind) for part in outcomes])["mean"] for kind in values]
                    cells = [*(percent(side) for side in values.values()), cell(difference, 100.0), *(f"{n:.1f}" for n in tokens)]
                    lines.append([split, recipe, model, picker, str(outcomes[0].rounds), *cells])
    header = ["split", "recipe", "model", "picked by", "samples", "best of chain", "best of parallel", "difference"]
    header += ["tokens of chain", "tokens of parallel"]
    return markdown(header, lines) if lines else "Not measured: `evaluation.parallel` is smaller than `evaluation.rounds`."


def label_table(results: list[Result]) -> str:
    lines = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        for iteration in sorted({number for result in results if result.recipe == recipe for number in result.labels}):
            of_runs = [labels for r in results if r.recipe == recipe and (labels := r.labels.get(iteration))]
            shares = [cell(pooled([share(part, wanted) for part in of_runs]), 100.0) for wanted in (1, 0, -1) if of_runs]
            size = f"{np.mean([len(part) for part in of_runs]):.0f}" if of_runs else "0"
            lines.append([recipe, str(iteration), size, *(shares or [""] * 3)])
    return markdown(["recipe", "iteration", "pairs", "chosen better %", "equal %", "worse %"], lines)


def compute_table(results: list[Result]) -> str:
    """Seconds and generated tokens of a run, mean over seeds."""
    names = dict.fromkeys(line["stage"] for result in results for line in result.stages if line["iteration"] and line["seconds"])
    lines = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        runs = [result.stages for result in results if result.recipe == recipe]
        seconds: dict[str, float] = defaultdict(float)
        tokens: dict[str, float] = defaultdict(float)
        for line in (line for stages in runs for line in stages):
            seconds[line["stage"] if line["iteration"] else "iteration 0"] += line["seconds"] / len(runs)
            if line["iteration"]:
                tokens[line["stage"]] += line.get("num_tokens", 0) / len(runs)
        cells = [f"{seconds[name]:.0f}" for name in ("iteration 0", *names)]
        generated = [f"{tokens[name]:,.0f}" for name in ("generations", "evaluation")]
        lines.append([recipe, *cells, f"{sum(seconds.values()):.0f}", *generated])
    return markdown(
        ["recipe", "iteration 0 s", *(f"{name} s" for name in names), "all s", "tokens of drafts", "tokens of evaluation"], lines
    )


def claim_table(claims: list[dict[str, Any]]) -> str:
    lines = []
    for claim in claims:
        reached = {True: "yes", False: "**no**"}.get(claim["reached"], claim.get("note", ""))
        figures = [effect_text(claim), ", ".join(f"{seed}: {effect_text(part)}" for seed, part in claim["per_seed"].items())]
        lines.append([claim["claim"], claim["statement"], reached, *figures, claim["unit"]])
    return markdown(["claim", "statement", "reached", "effect", "by seed", "unit"], lines)


def effect_text(figures: dict[str, Any]) -> str:
    """`effect [low, high]`; empty if it was not measured."""
    if figures["effect"] is None:
        return ""
    return f"{figures['effect']:.1f} [{figures['interval'][0]:.1f}, {figures['interval'][1]:.1f}]"


def study_page(results: list[Result], claims: list[dict[str, Any]], command: str) -> str:
    """STUDY.md: the claims, then the tables that they are computed from."""
    seeds = ", ".join(str(seed) for seed in sorted({result.seed for result in results}))
    splits = dict.fromkeys(split for result in results for model in result.models.values() for split in model)
    parts = [
        "# Study on the tiny world",
        f"`{command}`; seeds {seeds}, each with its own base model, training and evaluation.",
        "Exact match in % on held-out prompts; y1 is the direct answer. Brackets are 95 % score intervals (Wilson's for "
        "shares, Tango's for differences, which are paired by prompt). The prompts of all seeds are one sample, each seed with "
        "the same weight, so the intervals do not contain the variation between seeds; the lines by seed show it. "
        f"From fewer than {MIN_PROMPTS} prompts (or pairs), a claim is neither reached nor missed.",
        "## Claims",
        claim_table(claims),
        "## Exact match by round",
        *(exact_match_tables(results, split) for split in splits),
        "## Best of a chain against the best of the same number of parallel samples",
        "Tokens are the generated tokens per prompt.",
        best_table(results),
        "## Are the selected pairs right?",
        "Pairs of one run, mean over seeds. The verifier, which the selection need not use, decides whether chosen is better.",
        label_table(results),
        "## Compute",
        "One run, mean over seeds. Runs of a seed share the stages of iteration 0 that they have in common; their seconds are in "
        "the run that computed them. Scoring overlaps with generation and is timed with it.",
        compute_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def figure(results: list[Result], path: Path) -> None:
    """Draws exact match by round on held-out prompts, EVOLVE beside iterative DPO; bars are the intervals of `pooled`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"tiny": "EVOLVE", "tiny_iterative_dpo": "iterative DPO"}
    lines = [line for line in grouped(results) if line[0] in panels]
    recipes = [recipe for recipe in panels if any(line[0] == recipe for line in lines)]
    if not recipes:
        return
    names = list(dict.fromkeys(model for _, model, _ in lines))
    shades = pyplot.get_cmap("viridis")(np.linspace(0.1, 0.85, len(names)))
    colors = dict(zip(names, shades, strict=True)) | {"base": "0.6", "activation": "0.25"}
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "evolve-ray"}):
        drawing, (axes,) = pyplot.subplots(1, len(recipes), figsize=(4.2 * len(recipes), 3.6), sharey=True, squeeze=False)
        drawn: dict[str, Any] = {}
        for recipe, model, runs in lines:
            outcomes = [result.outcomes(model) for result in runs]
            rounds = range(1, min(part.rounds for part in outcomes) + 1)
            figures = [pooled([part.y(number) for part in outcomes]) for number in rounds]
            means, low, high = (np.array([100 * part[name] for part in figures]) for name in ("mean", "low", "high"))
            axis, bars = axes[recipes.index(recipe)], np.maximum([means - low, high - means], 0.0)
            drawn[model] = axis.errorbar(rounds, means, yerr=bars, color=colors[model], marker="o", capsize=3)
            axis.set_xticks(rounds, [f"y{number}" for number in rounds])
            axis.set_title(panels[recipe])
        axes[0].set_ylim(0, 100)
        axes[0].set_ylabel("exact match, %")
        axes[-1].legend(drawn.values(), drawn, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        drawing.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(drawing)
