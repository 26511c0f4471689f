"""report.html: what a run did, whether refinement helps, what it cost, and chains to read. One page that loads nothing.

`render` is a pure function of the report, the counts of rejected rows and the collected chains: the same three give the same
bytes. A section is left out if the run did not measure what it shows.
"""

import json
import re
from collections import Counter
from typing import Any

from evolve_ray.config.run_options import MIN_PROMPTS
from evolve_ray.evaluate.controller import in_words
from evolve_ray.report import chains, charts, costs, recipe, strategies
from evolve_ray.report.charts import MARKERS, Move, Series, short
from evolve_ray.report.markup import document, escape, figure, panels, section, table
from evolve_ray.report.views import (
    EXACT,
    MODEL_AXIS,
    RUN_COLORS,
    Evaluated,
    Measure,
    color_and_marker,
    evaluated,
    gains_of,
    interval_text,
    last_round,
    mean_text,
    measure_of,
    name_of,
    pick_for_drawing,
    point,
    rounds_in_order,
    runs_of,
    splits_of,
    tick_of,
)
from evolve_ray.store.run import Run

ARROW = " \N{RIGHTWARDS ARROW} "
NUMBERS = re.compile(r"(?<![\w.])\d+(?!\.?\w)")


def rejected_counts(run: Run) -> list[tuple[int, str, str, int]]:
    """(iteration, stage, reason, rows); numbers inside a reason become N, so that equal reasons are counted together."""
    counts: Counter[tuple[int, str, str]] = Counter()
    for path in sorted(run.root.glob("iteration-*/rejected.jsonl")):
        iteration = int(path.parent.name.removeprefix("iteration-"))
        with open(path, "rb") as file:
            # Keys are sorted, so lines with equal reason and stage have equal ends: each end is parsed once, not each line.
            ends = Counter(line[line.rfind(b',"reason":') + 1 :] for line in file)
        for end, times in ends.items():
            row = json.loads(end if end.startswith(b"{") else b"{" + end)
            counts[iteration, row["stage"], NUMBERS.sub("N", row["reason"])] += times
    ordered = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0]))
    return [(*key, count) for key, count in ordered]


def verdict(gain: dict[str, float], n: int) -> str:
    """What the interval of a gain over `n` prompts shows: refinement helps, hurts, or has no clear effect."""
    if n < MIN_PROMPTS:
        return f"\N{WHITE CIRCLE} too few prompts to say, at least {MIN_PROMPTS} are needed"
    if gain["low"] > 0:
        return "\N{BLACK UP-POINTING TRIANGLE} refinement helps"
    return "\N{BLACK DOWN-POINTING TRIANGLE} refinement hurts" if gain["high"] < 0 else "\N{BLACK CIRCLE} no clear effect"


def answer(report: dict[str, Any]) -> str:
    """One card per split: the gain of the last model, and its direct and refined answers against those of the first model."""
    cards = []
    for split in splits_of(report):
        models = [(model, figures) for model, figures in evaluated(report, split) if not model.get("rolled_back")]
        if not models:
            continue
        (first, first_figures), (last, last_figures) = models[0], models[-1]
        measure, num_rounds = measure_of(models), len(last_figures["rounds"])
        gain, n = last_figures["gain"][measure.name], last_figures["rounds"]["1"]["n"]
        lines = [
            ("direct answer y1", first_figures["rounds"]["1"], last_figures["rounds"]["1"]),
            (f"refined answer y{num_rounds}", last_round(first_figures), last_round(last_figures)),
        ]
        rows = "".join(
            f"<dt>{term}</dt><dd>{ARROW.join(mean_text(part[measure.name], measure) for part in parts)}</dd>"
            for term, *parts in lines
        )
        sign = "+" if gain["mean"] >= 0 else ""
        passage = escape(short(first["name"]) + ARROW + short(last["name"]))
        cards.append(
            f'<div class="card"><h3>{escape(split)} <small>({n:,} prompts)</small></h3>'
            f"{verdict(gain, n)}<strong>{sign}{mean_text(gain, measure)} {measure.unit}</strong>"
            f"gain y{num_rounds} \N{MINUS SIGN} y1 of {escape(name_of(last))}: {interval_text(gain, measure)}"
            f"<dl><dt>{escape(measure.title)}</dt><dd>{passage}</dd>{rows}</dl></div>"
        )
    text = (
        "The gain is the quality of the last refined answer minus that of the direct answer, for the same model and the same "
        "prompt, averaged over the prompts. Refinement helps if the whole 95 % interval is above zero, and hurts if it is below. "
        f"Fewer than {MIN_PROMPTS} prompts show nothing. Brackets and bars are score intervals over the prompts of this run "
        "(Wilson's for shares and means, Tango's for paired differences; Student's t for rewards beyond -1 to 1); a run with "
        "another seed may differ by more."
    )
    return section("answer", "Does refinement help?", text, panels(cards))


def round_table(models: Evaluated, measure: Measure) -> tuple[list[str], list[list[Any]]]:
    """(header, lines): every round of every model, and its gain over the first round."""
    num_rounds = max(len(figures["rounds"]) for _, figures in models)
    header = ["model", *(f"y{k}" for k in range(1, num_rounds + 1)), *(f"y{k} - y1" for k in range(2, num_rounds + 1)), "prompts"]
    lines = []
    for model, figures in models:
        gains = gains_of(figures, measure)
        cells = [interval_text(part[measure.name], measure) for part in rounds_in_order(figures)]
        cells += [""] * (num_rounds - len(cells))
        cells += [interval_text(gains[k], measure) if k in gains else "" for k in range(2, num_rounds + 1)]
        lines.append([name_of(model), *cells, figures["rounds"]["1"]["n"]])
    return header, lines


def gains(report: dict[str, Any]) -> str:
    """The gain of every round of every model, drawn around zero."""
    parts = []
    for place, split in enumerate(splits_of(report)):
        models = evaluated(report, split)
        if not models or all(len(figures["rounds"]) < 2 for _, figures in models):
            continue
        measure, groups = measure_of(models), []
        for model, figures in models:
            points = [point(k, part, measure) for k, part in gains_of(figures, measure).items()]
            groups.append(Series(name_of(model), *color_and_marker(report, model), points))
        alt = f"Gain of each round over the direct answer on {split}, {measure.title}, by model; the numbers are below"
        svg = charts.forest(f"gain{place}", alt, groups, x=f"gain over y1, {measure.unit or measure.title}")
        parts.append(figure(split, svg, *round_table(models, measure)))
    text = (
        "Each bar is one round of a model against the direct answer y1 of the same model; the last round has the strongest bar. "
        "Right of zero, refinement makes the answers better; left of zero, it makes them worse."
    )
    return section("gain", "Gain by round", text, panels(parts))


def rounds(report: dict[str, Any]) -> str:
    """The quality of every round."""
    parts = []
    legend: dict[str, Series] = {}
    for place, split in enumerate(splits_of(report)):
        models = evaluated(report, split)
        if not models:
            continue
        measure, series = measure_of(models), []
        for model, figures in pick_for_drawing(models):
            points = [point(k, part[measure.name], measure) for k, part in enumerate(rounds_in_order(figures))]
            series.append(Series(name_of(model), *color_and_marker(report, model), points))
        legend |= {part.label: part for part in series}
        ticks = [f"y{k}" for k in range(1, max(len(figures["rounds"]) for _, figures in models) + 1)]
        svg = charts.lines(f"round{place}", f"{measure.title} of each round on {split}, by model", series, ticks, y=measure.title)
        parts.append(figure(split, svg, *round_table(models, measure)))
    text = (
        "y1 is the direct answer to the prompt, y2 is the refinement of y1, y3 that of y2, and so on. All models get the same "
        "prompts and the same sampling seeds."
    )
    return section("rounds", "Quality by round", text, charts.key(list(legend.values())) if parts else "", panels(parts))


def transitions(report: dict[str, Any]) -> str:
    """How many prompts the last round made better or worse than the first."""
    parts = []
    for place, split in enumerate(splits_of(report)):
        models = [(model, figures) for model, figures in evaluated(report, split) if len(figures["rounds"]) > 1]
        if not models:
            continue
        exact = measure_of(models) is EXACT
        better, worse = ("wrong to right", "right to wrong") if exact else ("higher reward", "lower reward")
        moves, lines = [], []
        for model, figures in models:
            last = last_round(figures)
            changed = last["against_first"]
            ups, downs = (changed[name] for name in (("wrong_to_right", "right_to_wrong") if exact else ("improved", "degraded")))
            moves.append(Move(name_of(model), ups, downs, last["n"] - ups - downs))
            stayed = [changed["kept_right"], changed["kept_wrong"]] if exact else [changed["unchanged"]]
            lines.append([name_of(model), ups, downs, *stayed, changed["same_text"], last["n"]])
        alt = f"Number of prompts of {split} whose answer changed: {better}, and {worse}, by model"
        same = ["stayed right", "stayed wrong"] if exact else ["same reward"]
        header = ["model", better, worse, *same, "same text", "prompts"]
        svg = charts.moves(f"move{place}", alt, moves, better=better, worse=worse)
        parts.append(figure(split, svg, header, lines))
    text = (
        "Each bar counts the prompts whose answer became better or worse from the first round to the last. The numbers below a "
        "figure also count the prompts whose answer stayed the same."
    )
    return section("transitions", "What refinement changed", text, panels(parts))


def over_models(report: dict[str, Any]) -> str:
    """Direct and refined answers, model after model."""
    parts, series = [], []
    for place, split in enumerate(splits_of(report)):
        models = evaluated(report, split)
        if not models:
            continue
        measure = measure_of(models)
        ticks = list(dict.fromkeys(tick_of(model) for model, _ in models))
        series = curves(report, models, ticks, measure)
        alt = f"{measure.title} on {split}, model after model: direct answers y1 and last refinements"
        header = ["model", "y1", "last refinement", "prompts"]
        lines = []
        for model, figures in models:
            ends = [figures["rounds"]["1"], last_round(figures)]
            lines.append([name_of(model), *(interval_text(end[measure.name], measure) for end in ends), ends[0]["n"]])
        svg = charts.lines(f"model{place}", alt, series, ticks, x=MODEL_AXIS, y=measure.title)
        parts.append(figure(split, svg, header, lines))
    text = "The direct answer y1 and the last refinement of each model, in the order of training."
    return section("models", "Direct and refined answers", text, charts.key(series) if series else "", panels(parts))


def curves(report: dict[str, Any], models: Evaluated, ticks: list[str], measure: Measure) -> list[Series]:
    """The series of y1 and of the last round; if several runs are compared, both for each run in the colour of the run."""
    runs, series = runs_of(report), []
    for place, run in enumerate(runs):
        of_run = [(model, figures) for model, figures in models if model.get("run", "") == run]
        for refined in (True, False):
            color, marker = "ba"[refined], "so"[refined]
            if len(runs) > 1:
                color, marker = RUN_COLORS[place % len(RUN_COLORS)], MARKERS[place % len(MARKERS)]
            ends = [(model, last_round(figures) if refined else figures["rounds"]["1"]) for model, figures in of_run]
            points = [point(ticks.index(tick_of(model)), end[measure.name], measure) for model, end in ends]
            label = "refined (last round)" if refined else "direct (y1)"
            series.append(Series(f"{run}: {label}" if run else label, color, marker, points, dashed=not refined))
    return series


def side_by_side(report: dict[str, Any]) -> str:
    """One table of all models of several runs: direct answer, last refinement and gain on each split."""
    splits = [(split, evaluated(report, split)) for split in splits_of(report) if evaluated(report, split)]
    header = ["model"]
    cells: dict[str, list[str]] = {name_of(model): [] for model in report["models"]}
    for split, models in splits:
        measure = measure_of(models)
        header += [f"{split}: y1", "last refinement", f"gain ({measure.title})"]
        figures_of = {name_of(model): figures for model, figures in models}
        for name, line in cells.items():
            figures = figures_of.get(name)
            parts = (figures["rounds"]["1"], last_round(figures), figures["gain"]) if figures else ()
            line += [interval_text(part[measure.name], measure) for part in parts] or [""] * 3
    return section("table", "Side by side", "", table(header, [[name, *line] for name, line in cells.items()]) if splits else "")


def decisions(report: dict[str, Any]) -> str:
    """The policy of the run, and what the controller decided after each iteration."""
    decided = [(model, model["decision"]) for model in report["models"] if model.get("decision")]
    lines = [
        [model["name"], decision["action"].replace("_", " "), decision["controller"], in_words(decision)]
        for model, decision in decided
    ]
    header = ["after", "decision", "controller", "reason"]
    policy = f"<p>Policy of the run: {escape(report['checkpoint'])}</p>" if report.get("checkpoint") else ""
    return policy + (table(header, lines) if lines else "")


def opening(report: dict[str, Any]) -> str:
    """The run in a few words: base model, evaluated models, held-out prompts, scorer, seed."""
    terms = dict(recipe.sentences(report["config"]))
    sizes = [f"{models[0][1]['num_prompts']:,} of {split}" for split in splits_of(report) if (models := evaluated(report, split))]
    names = ", ".join(name_of(model) for model in report["models"])
    parts = [f"base model: {terms['model']}" if "model" in terms else "", f"models: {names}" if names else ""]
    parts += [f"held-out prompts: {', '.join(sizes)}" if sizes else ""]
    parts += [f"{term}: {terms[term]}" for term in ("scorer", "seed") if term in terms]
    text = "; ".join(part for part in parts if part)
    return f"<p>{escape(text[:1].upper() + text[1:])}.</p>"


def render(report: dict[str, Any], rejected: list[tuple], collected: list[dict[str, Any]]) -> str:
    """The whole page as text."""
    ran = section("run", "What was run", "", recipe.render(report["config"]), decisions(report))
    parts = [
        ("answer", "answer", answer(report)),
        ("run", "recipe", ran),
        ("gain", "gain by round", gains(report)),
        ("rounds", "quality by round", rounds(report)),
        ("transitions", "what changed", transitions(report)),
        ("models", "direct and refined", over_models(report)),
        ("best", "best of n", costs.best_of(report)),
        ("strategies", "final answers", strategies.render(report)),
        ("compute", "compute", costs.compute(report)),
        ("drift", "drift", costs.drift(report)),
        ("ledger", "cost", costs.ledger(report, rejected)),
        ("chains", "chains", chains.render(collected)),
    ]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, text in parts if text)
    head = f"<header><h1>{escape(report['name'])}</h1>{opening(report)}<nav>{links}</nav></header>"
    return document(report["name"], head + "".join(text for _, _, text in parts), chains.STYLE)
