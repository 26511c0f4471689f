"""The sections of a page on what quality costs and what it hides: best of n, compute, drift, the ledger, rejected rows."""

from typing import Any

from evolve_ray.report import charts
from evolve_ray.report.charts import Point, Series
from evolve_ray.report.markup import details, figure, panels, section, table
from evolve_ray.report.views import (
    RUN_INKS,
    evaluated,
    few,
    last_of,
    look,
    measure_of,
    name_of,
    point,
    runs_of,
    said,
    splits_of,
    tick_of,
)

MARKS = ("o", "^", "s", "D", "v", "P")
MAX_REASONS = 60
INKS = ("a", "b", "c", "d", "e", "f")


def best_of(report: dict[str, Any]) -> str:
    """The scorer's best of a chain against its best of as many independent samples."""
    parts = []
    drawn: list[Series] = []
    for place, split in enumerate(splits_of(report)):
        found = [(model, figures) for model, figures in evaluated(report, split) if figures.get("best_of")]
        if not found:
            continue
        measure = measure_of(found)
        ticks = list(dict.fromkeys(tick_of(model) for model, _ in found))
        drawn = []
        for number, run in enumerate(runs_of(report)):
            own = [(model, figures["best_of"]) for model, figures in found if model.get("run", "") == run]
            for side, ink, marker in (("chain", "a", "o"), ("parallel", "b", "s")):
                label = f"{run}: best of {side}" if run else f"best of {side}"
                shade = RUN_INKS[number % len(RUN_INKS)] if run else ink
                points = [point(ticks.index(tick_of(model)), best[side][measure.name], measure) for model, best in own]
                drawn.append(Series(label, shade, marker, points, dashed=side == "parallel"))
        lines = []
        for model, figures in found:
            best = figures["best_of"]
            cells = [said(best[side][measure.name], measure) for side in ("chain", "parallel", "difference")]
            tokens = [f"{best[side]['mean_tokens']:.1f}" for side in ("chain", "parallel")]
            lines.append([name_of(model), best["num_responses"], *cells, *tokens, best["n"]])
        header = [
            "model",
            "responses",
            "best of chain",
            "best of parallel",
            "difference",
            "tokens of chain",
            "of parallel",
            "prompts",
        ]
        alt = f"{measure.title} on {split}: the scorer's best of a chain and of as many parallel samples, by model"
        svg = charts.lines(f"best{place}", alt, drawn, ticks, x="model, or after iteration", y=measure.title)
        parts.append(figure(split, svg, header, lines))
    text = (
        "The scorer picks the best of a chain's drafts, and the best of as many independent answers; tokens are generated ones."
    )
    return section(
        "best", "Best of the chain against best of parallel samples", text, charts.key(drawn) if drawn else "", panels(parts)
    )


def compute(report: dict[str, Any]) -> str:
    """Quality against generated tokens, where the report has it."""
    parts = []
    legend: dict[str, Series] = {}
    for place, split in enumerate(splits_of(report)):
        found = evaluated(report, split)
        own = {name_of(model): model for model, _ in few(found)}
        entries = [entry for entry in report.get("compute", []) if entry["split"] == split and entry["chain"]]
        if not entries or not found:
            continue
        measure = measure_of(found)
        header = ["model", "answers", "generated tokens a prompt", measure.title]
        lines, drawn = [], []
        for entry in entries:
            sides = [(f"y{step['round']}", step) for step in entry["chain"]]
            best = entry["best_of"] or {}
            sides += [(f"best of {best['num_responses']}, {side}", best[side]) for side in ("chain", "parallel") if side in best]
            sides += [("one longer answer", entry["longer"])] if entry.get("longer") else []
            lines += [
                [entry["model"], label, f"{step['mean_tokens']:.1f}", said(step[measure.name], measure)] for label, step in sides
            ]
            if entry["model"] in own:
                points = [point(step["mean_tokens"], step[measure.name], measure) for step in entry["chain"]]
                drawn.append(Series(entry["model"], *look(report, own[entry["model"]]), points))
        if best:
            for side, ink, marker in (("chain", "c", "P"), ("parallel", "b", "X")):
                at = point(best[side]["mean_tokens"], best[side][measure.name], measure)
                drawn.append(Series(f"best of {best['num_responses']}, {side} ({entries[-1]['model']})", ink, marker, [at]))
        if entries[-1].get("longer"):
            at = point(entries[-1]["longer"]["mean_tokens"], entries[-1]["longer"][measure.name], measure)
            drawn.append(Series(f"one longer answer ({entries[-1]['model']})", "d", "D", [at]))
        legend |= {series.label: series for series in drawn}
        alt = (
            f"{measure.title} on {split} against generated tokens per prompt, one curve for each model from y1 to the last round"
        )
        svg = charts.lines(f"compute{place}", alt, drawn, None, x="generated tokens a prompt, all rounds so far", y=measure.title)
        parts.append(figure(split, svg, header, lines))
    key = charts.key(list(legend.values())) if legend else ""
    return section("compute", "Quality against compute", "Left is cheaper, up is better.", key, panels(parts))


def drift(report: dict[str, Any]) -> str:
    """Whether reward and truth part, lengths run away, answers become alike, or the policy wanders off."""
    splits = [split for split in splits_of(report) if evaluated(report, split)]
    models = report["models"]
    ticks = [tick_of(model) for model in models]
    looks = dict(zip(splits, zip(INKS, MARKS, strict=True), strict=False))  # of six splits at most
    plots: list[tuple[str, str, list[Series]]] = []
    for title, unit, value in (
        ("Reward of the last round", "reward", lambda end: end["reward"]),
        ("Exact match of the last round", "exact match", lambda end: end.get("exact_match")),
        ("Length of the last round", "tokens", lambda end: end.get("mean_response_tokens")),
        ("Diversity of the last round", "distinct-2", lambda end: end.get("distinct_2")),
    ):
        series = []
        for split, (ink, marker) in looks.items():
            ends = [(x, last_of(model["splits"][split])) for x, model in enumerate(models) if rounds_of(model, split)]
            points = [as_point(x, value(end)) for x, end in ends if value(end) is not None]
            series += [Series(split, ink, marker, points)] if points else []
        plots.append((title, unit, series))
    probes = [("KL to the policy before", "kl_iteration", "a", "o"), ("KL to the first policy", "kl_initial", "b", "s")]
    moved = [
        Series(label, ink, marker, [as_point(x, m["probe"][name]) for x, m in enumerate(models) if m.get("probe")])
        for label, name, ink, marker in probes
    ]
    plots.append(("How far the policy moved", "KL, nats a response", [series for series in moved if series.points]))
    agreed = [
        Series(label, ink, marker, [as_point(x, share) for x, m in enumerate(models) if (share := truth(m, *path)) is not None])
        for label, path, ink, marker in (
            ("scorer orders drafts as the verifier does", ("pair_order", "share"), "a", "o"),
            ("chosen draft is truly better", ("labels", "accuracy"), "b", "s"),
        )
    ]
    plots.append(("Scorer against truth", "share", [series for series in agreed if series.points]))
    parts = [plot(f"drift{place}", *given, ticks) for place, given in enumerate(plots) if given[2]]
    lines = [[name_of(model), *drift_cells(model["drift"])] for model in models if model.get("drift")]
    by_iteration = details("Drafts of each iteration", table(DRIFT, lines)) if lines else ""
    return section("drift", "Drift", "From model to model; a dot without a bar is a plain mean.", panels(parts), by_iteration)


def plot(name: str, title: str, unit: str, series: list[Series], ticks: list[str]) -> str:
    """One drawing over the models with its own legend."""
    alt = f"{title} ({unit}) from model to model: {', '.join(part.label for part in series)}"
    svg = charts.lines(name, alt, series, ticks, y=unit)
    means = [{point.x: f"{point.mean:.3f}" for point in part.points} for part in series]
    lines = [[tick, *(part.get(x, "") for part in means)] for x, tick in enumerate(ticks)]
    return figure(title, svg + charts.key(series), ["model", *(part.label for part in series)], lines)


def rounds_of(model: dict[str, Any], split: str) -> dict[str, Any]:
    return model["splits"].get(split, {"rounds": {}})["rounds"]


def as_point(x: int, figures: Any) -> Point:
    """Of a mean with its interval, or of a plain number."""
    if isinstance(figures, dict):
        return Point(x, figures["mean"], figures["low"], figures["high"])
    return Point(x, figures, figures, figures)


def truth(model: dict[str, Any], part: str, name: str) -> float | None:
    known = (model.get("drift") or {}).get("truth")
    return known[part][name] if known else None


DRIFT = ["drafts of", "drafts", "tokens", "against the first", "cut %", "duplicates %", "unchanged %", "score with length",
         "scorer agrees %", "chosen truly better %", "winning rounds"]  # fmt: skip


def drift_cells(found: dict[str, Any]) -> list[str]:
    def number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
        return "" if value is None else f"{value * scale:.{digits}f}"

    known = found["truth"] or {"pair_order": {"share": None}, "labels": {"accuracy": None}}
    return [
        number(found["num_drafts"], digits=0),
        number(found["mean_response_tokens"]),
        number(found["tokens_ratio"], digits=2),
        *(number(found[name], 100.0) for name in ("cut_rate", "duplicate_rate", "unchanged_rate")),
        number(found["score_tokens"]["within_prompt"], digits=2),
        number(known["pair_order"]["share"], 100.0),
        number(known["labels"]["accuracy"], 100.0),
        ", ".join(f"y{number}: {count:,}" for number, count in found["winning_rounds"].items()),
    ]


STAGE = {
    "iteration": "iteration",
    "stage": "stage",
    "seconds": "seconds",
    "num_in": "rows in",
    "num_rows": "rows out",
    "num_rejected": "rejected",
    "num_tokens": "tokens generated",
    "num_prompt_tokens": "prompted",
    "num_cached_tokens": "from cache",
    "num_saved_tokens": "saved by stopping",
    "num_guessed_tokens": "guessed",
    "num_accepted_tokens": "guessed right",
    "num_engine_steps": "engine steps",
    "num_updates": "updates",
    "engine_seconds": "engine s",
    "start_seconds": "start s",
    "idle_seconds": "idle s",
    "score_seconds": "scoring s",
    "train_seconds": "training s",
}


def ledger(report: dict[str, Any], rejected: list[tuple]) -> str:
    """Rows, tokens and seconds of every stage, and why rows were not used."""
    book = report.get("ledger") or {"stages": report["stages"], "iterations": []}
    parts = []
    if book["iterations"]:
        lines = [
            ["all" if row is book["total"] else row["iteration"], *row_of(row)[2:]]
            for row in [*book["iterations"], book["total"]]
        ]
        parts.append("<h3>By iteration</h3>" + table_of(["iteration", *list(STAGE.values())[2:]], lines))
    if book["stages"]:
        stages = table_of(list(STAGE.values()), [row_of(row) for row in book["stages"]])
        parts.append(details("By stage", stages) if parts else stages)
    if rejected:
        rest = len(rejected) - MAX_REASONS
        lines = [[number, stage, reason, f"{count:,}"] for number, stage, reason, count in rejected[:MAX_REASONS]]
        more = f"<p>and {rest:,} more reasons, in the iterations' rejected.jsonl</p>" if rest > 0 else ""
        parts.append("<h3>Rows not used, by reason</h3>" + table(["iteration", "stage", "reason", "rows"], lines) + more)
    text = "Rows, tokens and wall seconds; drafts and scores are made in one pipeline, whose time stands at the drafts."
    return section("ledger", "What it cost", text, *parts)


def row_of(row: dict[str, Any]) -> list[str]:
    values = [row.get(name) for name in STAGE]
    return ["" if v is None else f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in values]


def table_of(header: list[str], lines: list[list[str]]) -> str:
    """A table without the columns that are empty in every line."""
    kept = [place for place in range(len(header)) if any(line[place] != "" for line in lines)]
    return table([header[place] for place in kept], [[line[place] for place in kept] for line in lines])
