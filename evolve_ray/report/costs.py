"""The sections of the page on costs and on drift: best of n, compute, drift, the ledger, rejected rows."""

from typing import Any

from evolve_ray.report import charts
from evolve_ray.report.charts import Point, Series
from evolve_ray.report.clock import PARTS, TITLES
from evolve_ray.report.markup import details, figure, panels, section, table
from evolve_ray.report.views import (
    MODEL_AXIS,
    RUN_COLORS,
    color_and_marker,
    evaluated,
    interval_text,
    last_round,
    measure_of,
    name_of,
    pick_for_drawing,
    point,
    runs_of,
    splits_of,
    tick_of,
)

MARKS = ("o", "^", "s", "D", "v", "P")
MAX_REASONS = 60
COLORS = ("a", "b", "c", "d", "e", "f")


def best_of(report: dict[str, Any]) -> str:
    """The scorer's best response of a chain against its best of the same number of independent samples."""
    parts = []
    series: list[Series] = []
    for place, split in enumerate(splits_of(report)):
        models = [(model, figures) for model, figures in evaluated(report, split) if figures.get("best_of")]
        if not models:
            continue
        measure = measure_of(models)
        ticks = list(dict.fromkeys(tick_of(model) for model, _ in models))
        series = []
        for number, run in enumerate(runs_of(report)):
            of_run = [(model, figures["best_of"]) for model, figures in models if model.get("run", "") == run]
            for side, color, marker in (("chain", "a", "o"), ("parallel", "b", "s")):
                label = f"{run}: best of {side}" if run else f"best of {side}"
                shade = RUN_COLORS[number % len(RUN_COLORS)] if run else color
                points = [point(ticks.index(tick_of(model)), best[side][measure.name], measure) for model, best in of_run]
                series.append(Series(label, shade, marker, points, dashed=side == "parallel"))
        lines = []
        for model, figures in models:
            best = figures["best_of"]
            cells = [interval_text(best[side][measure.name], measure) for side in ("chain", "parallel", "difference")]
            tokens = [f"{best[side]['mean_tokens']:.1f}" for side in ("chain", "parallel")]
            lines.append([name_of(model), best["num_responses"], *cells, *tokens, best["n"]])
        header = [
            "model",
            "responses per prompt",
            "best of chain",
            "best of parallel",
            "difference",
            "tokens, chain",
            "tokens, parallel",
            "prompts",
        ]
        alt = f"{measure.title} on {split}: the scorer's best of a chain and of the same number of parallel samples, by model"
        svg = charts.lines(f"best{place}", alt, series, ticks, x=MODEL_AXIS, y=measure.title)
        parts.append(figure(split, svg, header, lines))
    text = (
        "The scorer picks the best draft of a chain, and the best of the same number of independent answers (parallel samples). "
        "Tokens are the generated tokens per prompt."
    )
    return section(
        "best", "Best of a chain against best of parallel samples", text, charts.key(series) if series else "", panels(parts)
    )


def compute(report: dict[str, Any]) -> str:
    """Quality against generated tokens, if the report has it."""
    parts = []
    legend: dict[str, Series] = {}
    for place, split in enumerate(splits_of(report)):
        models = evaluated(report, split)
        model_of = {name_of(model): model for model, _ in pick_for_drawing(models)}
        entries = [entry for entry in report.get("compute", []) if entry["split"] == split and entry["chain"]]
        if not entries or not models:
            continue
        measure = measure_of(models)
        header = ["model", "answers", "generated tokens per prompt", measure.title]
        lines, series = [], []
        for entry in entries:
            sides = [(f"y{step['round']}", step) for step in entry["chain"]]
            best = entry["best_of"] or {}
            sides += [(f"best of {best['num_responses']}, {side}", best[side]) for side in ("chain", "parallel") if side in best]
            sides += [("one longer answer", entry["longer"])] if entry.get("longer") else []
            lines += [
                [entry["model"], label, f"{step['mean_tokens']:.1f}", interval_text(step[measure.name], measure)]
                for label, step in sides
            ]
            if entry["model"] in model_of:
                points = [point(step["mean_tokens"], step[measure.name], measure) for step in entry["chain"]]
                series.append(Series(entry["model"], *color_and_marker(report, model_of[entry["model"]]), points))
        if best:
            for side, color, marker in (("chain", "c", "P"), ("parallel", "b", "X")):
                end = point(best[side]["mean_tokens"], best[side][measure.name], measure)
                series.append(Series(f"best of {best['num_responses']}, {side} ({entries[-1]['model']})", color, marker, [end]))
        if entries[-1].get("longer"):
            end = point(entries[-1]["longer"]["mean_tokens"], entries[-1]["longer"][measure.name], measure)
            series.append(Series(f"one longer answer ({entries[-1]['model']})", "d", "D", [end]))
        legend |= {part.label: part for part in series}
        alt = (
            f"{measure.title} on {split} against generated tokens per prompt, one curve for each model from y1 to the last round"
        )
        svg = charts.lines(
            f"compute{place}", alt, series, None, x="generated tokens per prompt, all rounds so far", y=measure.title
        )
        parts.append(figure(split, svg, header, lines))
    text = "Each curve is one model, from y1 to the last round. Left is cheaper, up is better."
    key = charts.key(list(legend.values())) if legend else ""
    return section("compute", "Quality against compute", text, key, panels(parts))


def drift(report: dict[str, Any]) -> str:
    """Shows whether reward and exact match diverge, lengths grow, answers become alike, or the policy moves far."""
    splits = [split for split in splits_of(report) if evaluated(report, split)]
    models = report["models"]
    ticks = [tick_of(model) for model in models]
    looks = dict(zip(splits, zip(COLORS, MARKS, strict=True), strict=False))  # at most six splits
    plots: list[tuple[str, str, list[Series]]] = []
    for title, unit, value in (
        ("Reward of the last round", "reward", lambda last: last["reward"]),
        ("Exact match of the last round", "exact match", lambda last: last.get("exact_match")),
        ("Length of the last round", "tokens", lambda last: last.get("mean_response_tokens")),
        ("Diversity of the last round", "distinct-2", lambda last: last.get("distinct_2")),
    ):
        series = []
        for split, (color, marker) in looks.items():
            lasts = [(x, last_round(model["splits"][split])) for x, model in enumerate(models) if rounds_of(model, split)]
            points = [as_point(x, value(last)) for x, last in lasts if value(last) is not None]
            series += [Series(split, color, marker, points)] if points else []
        plots.append((title, unit, series))
    probes = [("KL to the previous policy", "kl_iteration", "a", "o"), ("KL to the first policy", "kl_initial", "b", "s")]
    kl_series = [
        Series(label, color, marker, [as_point(x, m["probe"][name]) for x, m in enumerate(models) if m.get("probe")])
        for label, name, color, marker in probes
    ]
    plots.append(("How far the policy moved", "KL, nats per response", [part for part in kl_series if part.points]))
    agreement = [
        Series(label, color, marker, [as_point(x, share) for x, m in enumerate(models) if (share := truth(m, *path)) is not None])
        for label, path, color, marker in (
            ("scorer orders two drafts as the verifier does", ("pair_order", "share"), "a", "o"),
            ("chosen draft is better by the verifier", ("labels", "accuracy"), "b", "s"),
        )
    ]
    plots.append(("Scorer against verifier", "share", [part for part in agreement if part.points]))
    parts = [plot(f"drift{place}", *arguments, ticks) for place, arguments in enumerate(plots) if arguments[2]]
    lines = [[name_of(model), *drift_cells(model["drift"])] for model in models if model.get("drift")]
    by_iteration = details("Drafts of each iteration", table(DRIFT, lines)) if lines else ""
    text = (
        "How the models change during the run. A reward that rises while exact match falls, or a length that keeps growing, is "
        "a sign that the policy exploits the scorer. A point without a bar is a mean without an interval."
    )
    return section("drift", "Drift", text, panels(parts), by_iteration)


def plot(name: str, title: str, unit: str, series: list[Series], ticks: list[str]) -> str:
    """One drawing over the models, with its own legend."""
    alt = f"{title} ({unit}), model after model: {', '.join(part.label for part in series)}"
    svg = charts.lines(name, alt, series, ticks, y=unit)
    means = [{point.x: f"{point.mean:.3f}" for point in part.points} for part in series]
    lines = [[tick, *(part.get(x, "") for part in means)] for x, tick in enumerate(ticks)]
    return figure(title, svg + charts.key(series), ["model", *(part.label for part in series)], lines)


def rounds_of(model: dict[str, Any], split: str) -> dict[str, Any]:
    return model["splits"].get(split, {"rounds": {}})["rounds"]


def as_point(x: int, figures: Any) -> Point:
    """The point of a mean with its interval, or of a plain number."""
    if isinstance(figures, dict):
        return Point(x, figures["mean"], figures["low"], figures["high"])
    return Point(x, figures, figures, figures)


def truth(model: dict[str, Any], part: str, name: str) -> float | None:
    """A figure of the scorer against the verifier; None without a verifier."""
    against_verifier = (model.get("drift") or {}).get("truth")
    return against_verifier[part][name] if against_verifier else None


DRIFT = ["iteration", "drafts", "tokens per draft", "tokens / first iteration", "cut %", "duplicates %", "unchanged %",
         "correlation of score and length", "scorer agrees with verifier %", "chosen better by verifier %",
         "round of the chosen draft"]  # fmt: skip


def drift_cells(figures: dict[str, Any]) -> list[str]:
    def number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
        return "" if value is None else f"{value * scale:.{digits}f}"

    against_verifier = figures["truth"] or {"pair_order": {"share": None}, "labels": {"accuracy": None}}
    return [
        number(figures["num_drafts"], digits=0),
        number(figures["mean_response_tokens"]),
        number(figures["tokens_ratio"], digits=2),
        *(number(figures[name], 100.0) for name in ("cut_rate", "duplicate_rate", "unchanged_rate")),
        number(figures["score_tokens"]["within_prompt"], digits=2),
        number(against_verifier["pair_order"]["share"], 100.0),
        number(against_verifier["labels"]["accuracy"], 100.0),
        ", ".join(f"y{number}: {count:,}" for number, count in figures["winning_rounds"].items()),
    ]


STAGE = {
    "iteration": "iteration",
    "stage": "stage",
    "seconds": "seconds",
    "num_in": "rows in",
    "num_rows": "rows out",
    "num_rejected": "rejected",
    "num_tokens": "tokens generated",
    "num_prompt_tokens": "prompt tokens",
    "num_cached_tokens": "cached prompt tokens",
    "num_saved_tokens": "tokens saved by stopping",
    "num_guessed_tokens": "speculative tokens",
    "num_accepted_tokens": "accepted speculative tokens",
    "num_thinking_tokens": "tokens of thinking",
    "num_without_answer": "responses without an answer",
    "num_broken": "responses with a broken text",
    "num_judge_asks": "questions to the judge",
    "num_unparsable": "replies without a vote",
    "num_refused": "refused by the judge",
    "num_judge_tokens": "judge's tokens",
    "num_judge_prompt_tokens": "judge's prompt tokens",
    "num_engine_steps": "engine steps",
    "num_updates": "optimiser updates",
    "engine_seconds": "engine s",
    "start_seconds": "engine start s",
    "idle_seconds": "engine idle s",
    "score_seconds": "scoring s",
    "train_seconds": "training s",
}


ASKED = {
    "num_asks": "asks",
    "num_prompt_tokens": "prompt tokens",
    "num_tokens": "generated tokens",
    "engine_seconds": "engine s",
}


def ledger(report: dict[str, Any], rejected: list[tuple]) -> str:
    """Rows, tokens and seconds of every stage, and the reasons why rows were rejected."""
    book = report.get("ledger") or {"stages": report["stages"], "iterations": []}
    parts = [times] if (times := clock(book.get("clock", []))) else []
    if book["iterations"]:
        lines = [
            ["all" if row is book["total"] else row["iteration"], *row_of(row)[2:]]
            for row in [*book["iterations"], book["total"]]
        ]
        parts.append("<h3>By iteration</h3>" + table_of(["iteration", *list(STAGE.values())[2:]], lines))
    if book["stages"]:
        stages = table_of(list(STAGE.values()), [row_of(row) for row in book["stages"]])
        parts.append(details("By stage", stages) if book["iterations"] else stages)
    mixtures = [[row["iteration"], row["mixture"]] for row in book["stages"] if "mixture" in row]
    asked = [
        [row["iteration"], row["stage"], name, *(f"{counts.get(what, 0):,}" for what in ASKED)]
        for row in book["stages"]
        for name, counts in row.get("by_model", {}).items()
    ]
    if asked:
        header = ["iteration", "stage", "model", *ASKED.values()]
        parts.append("<h3>Asks to further models</h3><p>Tokens are in the sums above too.</p>" + table(header, asked))
    if mixtures:
        parts.append("<h3>Rows of the trainings</h3>" + table(["iteration", "rows"], mixtures))
    if rejected:
        rest = len(rejected) - MAX_REASONS
        lines = [[number, stage, reason, f"{count:,}"] for number, stage, reason, count in rejected[:MAX_REASONS]]
        more = f"<p>{rest:,} more reasons are in rejected.jsonl of each iteration</p>" if rest > 0 else ""
        parts.append("<h3>Rejected rows by reason</h3>" + table(["iteration", "stage", "reason", "rows"], lines) + more)
    text = (
        "Rows, tokens and wall-clock seconds. Drafts are generated and scored in one pipeline; its seconds are in the row of the "
        'stage "generations". Engine seconds are summed over all engines.'
    )
    return section("ledger", "What it cost", text, *parts)


def clock(iterations: list[dict[str, Any]]) -> str:
    """Where the wall-clock time of each iteration went, as a drawing and a table; empty without times."""
    if not iterations:
        return ""
    labels = [f"iteration {row['iteration']}" for row in iterations]
    series = [
        Series(TITLES[name], color, "s", [as_point(place, row[name]) for place, row in enumerate(iterations)])
        for name, color in zip(PARTS, COLORS, strict=True)
    ]
    alt = f"Wall-clock seconds of each iteration, split into {', '.join(TITLES.values())}"
    svg = charts.stacks("clock", alt, labels, series, x="wall-clock seconds")
    lines = [
        [label, f"{row['seconds']:,.1f}", *(f"{row[name]:,.1f} ({row[name] / max(row['seconds'], 1e-9):.0%})" for name in PARTS)]
        for label, row in zip(labels, iterations, strict=True)
    ]
    header = ["iteration", "seconds", *TITLES.values()]
    text = (
        "<p>Wall-clock seconds. Engines and scorers work side by side: scoring counts only after the last draft, waiting is one "
        "that has nothing left to do. Starts are processes, imports, Ray and the loading of models.</p>"
    )
    return "<h3>Where the time went</h3>" + text + svg + charts.key(series) + table(header, lines)


def row_of(row: dict[str, Any]) -> list[str]:
    values = [row.get(name) for name in STAGE]
    return ["" if v is None else f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in values]


def table_of(header: list[str], lines: list[list[str]]) -> str:
    """A table without the columns that are empty in every line."""
    filled = [place for place in range(len(header)) if any(line[place] != "" for line in lines)]
    return table([header[place] for place in filled], [[line[place] for place in filled] for line in lines])
