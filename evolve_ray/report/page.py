"""report.html: what a run did, whether refinement got better, what it cost and chains to read, in one page that loads nothing.

`render` is a pure function of the report, the counts of rejected rows and the collected chains: the same three give the same
bytes. Parts of a report that a run has not measured are left out.
"""

import json
import re
from collections import Counter
from typing import Any

from evolve_ray.report import chains, charts, costs, recipe
from evolve_ray.report.charts import MARKERS, Move, Series, short
from evolve_ray.report.markup import document, escape, figure, panels, section, table
from evolve_ray.report.views import (
    EXACT,
    RUN_INKS,
    Found,
    Measure,
    evaluated,
    few,
    gains_of,
    in_order,
    last_of,
    look,
    measure_of,
    name_of,
    point,
    runs_of,
    said,
    splits_of,
    tick_of,
    value,
)
from evolve_ray.store.run import Run

ARROW = " \N{RIGHTWARDS ARROW} "
NUMBERS = re.compile(r"(?<![\w.])\d+(?!\.?\w)")


def rejected_counts(run: Run) -> list[tuple[int, str, str, int]]:
    """(iteration, stage, reason, rows); numbers inside of reasons stand as N, so that alike reasons count together."""
    counts: Counter[tuple[int, str, str]] = Counter()
    for path in sorted(run.root.glob("iteration-*/rejected.jsonl")):
        number = int(path.parent.name.removeprefix("iteration-"))
        with open(path, "rb") as file:
            # Lines with sorted keys end alike where stage and reason are alike: millions of them are parsed once a reason.
            ends = Counter(line[line.rfind(b',"reason":') + 1 :] for line in file)
        for end, times in ends.items():
            row = json.loads(end if end.startswith(b"{") else b"{" + end)
            counts[number, row["stage"], NUMBERS.sub("N", row["reason"])] += times
    ordered = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0]))
    return [(*key, count) for key, count in ordered]


def judged(gain: dict[str, float]) -> str:
    """What the interval of a gain lets one say."""
    if gain["low"] > 0:
        return "\N{BLACK UP-POINTING TRIANGLE} refinement helps"
    return "\N{BLACK DOWN-POINTING TRIANGLE} refinement hurts" if gain["high"] < 0 else "\N{BLACK CIRCLE} no clear effect"


def answer(report: dict[str, Any]) -> str:
    """The last model on each split in one card: the gain of refinement, and where direct and refined answers came from."""
    cards = []
    for split in splits_of(report):
        found = [(model, figures) for model, figures in evaluated(report, split) if not model.get("rolled_back")]
        if not found:
            continue
        (first, before), (last, now) = found[0], found[-1]
        measure, rounds = measure_of(found), len(now["rounds"])
        gain = now["gain"][measure.name]
        lines = [
            ("direct answer y1", before["rounds"]["1"], now["rounds"]["1"]),
            (f"refined answer y{rounds}", last_of(before), last_of(now)),
        ]
        rows = "".join(
            f"<dt>{term}</dt><dd>{ARROW.join(value(part[measure.name], measure) for part in parts)}</dd>"
            for term, *parts in lines
        )
        sign = "+" if gain["mean"] >= 0 else ""
        passage = escape(short(first["name"]) + ARROW + short(last["name"]))
        cards.append(
            f'<div class="card"><h3>{escape(split)} <small>({now["rounds"]["1"]["n"]:,} prompts)</small></h3>{judged(gain)}'
            f"<strong>{sign}{value(gain, measure)} {measure.unit}</strong>"
            f"y{rounds} \N{MINUS SIGN} y1 in {escape(name_of(last))}: {said(gain, measure)}"
            f"<dl><dt>{escape(measure.title)}</dt><dd>{passage}</dd>{rows}</dl></div>"
        )
    text = (
        "The gain is the last refinement against the direct answer of the same model, paired by prompt. Brackets and bars are "
        "95 % bootstrap intervals over the prompts of this run; another seed may differ by more."
    )
    return section("answer", "Does asking for a refinement help?", text, panels(cards))


def round_table(found: Found, measure: Measure) -> tuple[list[str], list[list[Any]]]:
    """Every round of every model, and its gain over the first."""
    last = max(len(figures["rounds"]) for _, figures in found)
    header = ["model", *(f"y{k}" for k in range(1, last + 1)), *(f"y{k} - y1" for k in range(2, last + 1)), "prompts"]
    lines = []
    for model, figures in found:
        own = gains_of(figures, measure)
        cells = [said(part[measure.name], measure) for part in in_order(figures)]
        cells += [""] * (last - len(cells)) + [said(own[k], measure) if k in own else "" for k in range(2, last + 1)]
        lines.append([name_of(model), *cells, figures["rounds"]["1"]["n"]])
    return header, lines


def gains(report: dict[str, Any]) -> str:
    """Gain by round of every model, around zero."""
    parts = []
    for place, split in enumerate(splits_of(report)):
        found = evaluated(report, split)
        if not found or all(len(figures["rounds"]) < 2 for _, figures in found):
            continue
        measure, groups = measure_of(found), []
        for model, figures in found:
            points = [point(k, part, measure) for k, part in gains_of(figures, measure).items()]
            groups.append(Series(name_of(model), *look(report, model), points))
        alt = f"Gain of each round over the direct answer on {split}, {measure.title}, by model; the numbers are below"
        svg = charts.forest(f"gain{place}", alt, groups, x=f"gain over y1, {measure.unit or measure.title}")
        parts.append(figure(split, svg, *round_table(found, measure)))
    text = (
        "Each bar is one round of a model against its own direct answer y1, the last round strongest: right of zero, refinement "
        "improves; left of zero, it spoils."
    )
    return section("gain", "Gain by round", text, panels(parts))


def rounds(report: dict[str, Any]) -> str:
    """The quality of every round."""
    parts = []
    legend: dict[str, Series] = {}
    for place, split in enumerate(splits_of(report)):
        found = evaluated(report, split)
        if not found:
            continue
        measure, drawn = measure_of(found), []
        for model, figures in few(found):
            points = [point(k, part[measure.name], measure) for k, part in enumerate(in_order(figures))]
            drawn.append(Series(name_of(model), *look(report, model), points))
        legend |= {series.label: series for series in drawn}
        ticks = [f"y{k}" for k in range(1, max(len(figures["rounds"]) for _, figures in found) + 1)]
        svg = charts.lines(f"round{place}", f"{measure.title} of each round on {split}, by model", drawn, ticks, y=measure.title)
        parts.append(figure(split, svg, *round_table(found, measure)))
    text = "y1 answers the prompt directly, y2 refines y1, and so on. The same prompts and sampling seeds for every model."
    return section("rounds", "Quality by round", text, charts.key(list(legend.values())) if parts else "", panels(parts))


def transitions(report: dict[str, Any]) -> str:
    """What the last round changed against the first."""
    parts = []
    for place, split in enumerate(splits_of(report)):
        found = [(model, figures) for model, figures in evaluated(report, split) if len(figures["rounds"]) > 1]
        if not found:
            continue
        exact = measure_of(found) is EXACT
        better, worse = ("wrong to right", "right to wrong") if exact else ("higher reward", "lower reward")
        moves, lines = [], []
        for model, figures in found:
            last = last_of(figures)
            changed = last["against_first"]
            ups, downs = (changed[name] for name in (("wrong_to_right", "right_to_wrong") if exact else ("improved", "degraded")))
            moves.append(Move(name_of(model), ups, downs, last["n"] - ups - downs))
            kept = [changed["kept_right"], changed["kept_wrong"]] if exact else [changed["unchanged"]]
            lines.append([name_of(model), ups, downs, *kept, changed["same_text"], last["n"]])
        alt = f"Prompts of {split} whose answer went from {better}, and from {worse}, by model"
        header = ["model", better, worse, *(["kept right", "kept wrong"] if exact else ["kept"]), "same text", "prompts"]
        drawn = charts.moves(f"move{place}", alt, moves, better=better, worse=worse)
        parts.append(figure(split, drawn, header, lines))
    text = "Prompts whose answer refinement made right or wrong, last round against first. What it kept is in the numbers."
    return section("transitions", "What refinement changed", text, panels(parts))


def over_models(report: dict[str, Any]) -> str:
    """Direct and refined answers from model to model."""
    parts, drawn = [], []
    for place, split in enumerate(splits_of(report)):
        found = evaluated(report, split)
        if not found:
            continue
        measure = measure_of(found)
        ticks = list(dict.fromkeys(tick_of(model) for model, _ in found))
        drawn = curves(report, found, ticks, measure)
        alt = f"{measure.title} on {split} from model to model: direct answers y1 and last refinements"
        header = ["model", "y1", "last refinement", "prompts"]
        lines = []
        for model, figures in found:
            ends = [figures["rounds"]["1"], last_of(figures)]
            lines.append([name_of(model), *(said(end[measure.name], measure) for end in ends), ends[0]["n"]])
        svg = charts.lines(f"model{place}", alt, drawn, ticks, x="model, or after iteration", y=measure.title)
        parts.append(figure(split, svg, header, lines))
    return section("models", "Direct against refined answers", "", charts.key(drawn) if drawn else "", panels(parts))


def curves(report: dict[str, Any], found: Found, ticks: list[str], measure: Measure) -> list[Series]:
    """y1 and the last round over models; of several runs, both for each run in an ink of its own."""
    runs, drawn = runs_of(report), []
    for place, run in enumerate(runs):
        own = [(model, figures) for model, figures in found if model.get("run", "") == run]
        for refined in (True, False):
            ink, marker = "ba"[refined], "so"[refined]
            if len(runs) > 1:
                ink, marker = RUN_INKS[place % len(RUN_INKS)], MARKERS[place % len(MARKERS)]
            ends = [(model, last_of(figures) if refined else figures["rounds"]["1"]) for model, figures in own]
            points = [point(ticks.index(tick_of(model)), end[measure.name], measure) for model, end in ends]
            label = "refined (last round)" if refined else "direct (y1)"
            drawn.append(Series(f"{run}: {label}" if run else label, ink, marker, points, dashed=not refined))
    return drawn


def side_by_side(report: dict[str, Any]) -> str:
    """Every model of several runs in one table: direct answer, last refinement and gain on each split."""
    splits = [(split, evaluated(report, split)) for split in splits_of(report) if evaluated(report, split)]
    header = ["model"]
    cells: dict[str, list[str]] = {name_of(model): [] for model in report["models"]}
    for split, found in splits:
        measure = measure_of(found)
        header += [f"{split}: y1", "last refinement", f"gain ({measure.title})"]
        own = {name_of(model): figures for model, figures in found}
        for name, line in cells.items():
            parts = (own[name]["rounds"]["1"], last_of(own[name]), own[name]["gain"]) if name in own else ()
            line += [said(part[measure.name], measure) for part in parts] or [""] * 3
    return section("table", "Side by side", "", table(header, [[name, *line] for name, line in cells.items()]) if splits else "")


def decisions(report: dict[str, Any]) -> str:
    """Which controller decided what, and the policy that the run came to."""
    told = [(model, model["decision"]) for model in report["models"] if model.get("decision")]
    lines = [[model["name"], found["action"].replace("_", " "), found["controller"], found["reason"]] for model, found in told]
    header = ["after", "decision", "controller", "reason"]
    end = f"<p>Policy: {escape(report['checkpoint'])}</p>" if report.get("checkpoint") else ""
    return end + (table(header, lines) if lines else "")


def opening(report: dict[str, Any]) -> str:
    """The run in one sentence."""
    told = dict(recipe.sentences(report["config"]))
    sizes = [f"{found[0][1]['num_prompts']:,} of {split}" for split in splits_of(report) if (found := evaluated(report, split))]
    made = ", ".join(name_of(model) for model in report["models"])
    parts = [told.get("model", ""), f"models: {made}" if made else "", f"held-out prompts: {', '.join(sizes)}" if sizes else ""]
    parts += [f"{term}: {told[term]}" for term in ("scorer", "seed") if term in told]
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
        ("compute", "compute", costs.compute(report)),
        ("drift", "drift", costs.drift(report)),
        ("ledger", "cost", costs.ledger(report, rejected)),
        ("chains", "chains", chains.render(collected)),
    ]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, text in parts if text)
    head = f"<header><h1>{escape(report['name'])}</h1>{opening(report)}<nav>{links}</nav></header>"
    return document(report["name"], head + "".join(text for _, _, text in parts), chains.STYLE)
