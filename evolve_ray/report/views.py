"""What the sections of a page ask of a report: which models answered a split, by what measure, drawn in which ink."""

from typing import Any, NamedTuple

from evolve_ray.report.charts import MARKERS, Point, short
from evolve_ray.report.markup import cell

MAX_LINES = 6  # models in one drawing; the table below it has all
RUN_INKS = "abcdef"
Found = list[tuple[dict[str, Any], dict[str, Any]]]  # models with their figures on one split


class Measure(NamedTuple):
    name: str
    title: str
    unit: str
    scale: float
    digits: int


EXACT = Measure("exact_match", "exact match, %", "points", 100.0, 1)
REWARD = Measure("reward", "reward", "", 1.0, 3)


def splits_of(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for model in report["models"] for name in model["splits"]))


def evaluated(report: dict[str, Any], split: str) -> Found:
    """(model, its figures) of the models that have answered a split."""
    found = [(model, model["splits"].get(split, {"rounds": {}})) for model in report["models"]]
    return [(model, figures) for model, figures in found if figures["rounds"]]


def measure_of(found: Found) -> Measure:
    """Exact match where all have it, else the reward."""
    return EXACT if all("exact_match" in figures["rounds"]["1"] for _, figures in found) else REWARD


def runs_of(report: dict[str, Any]) -> list[str]:
    """The labels of compared runs; [""] for a report of one run."""
    return list(dict.fromkeys(model.get("run", "") for model in report["models"]))


def name_of(model: dict[str, Any]) -> str:
    label = f"{model['run']}: " if model.get("run") else ""
    return label + model["name"] + (" (rolled back)" if model.get("rolled_back") else "")


def tick_of(model: dict[str, Any]) -> str:
    return short(model["name"].removeprefix("iteration "), 11)


def look(report: dict[str, Any], model: dict[str, Any]) -> tuple[str, str]:
    """(ink, marker) of a model, the same in every drawing: by iteration, or by run where several are compared."""
    runs = runs_of(report)
    own = [other["name"] for other in report["models"] if other.get("run", "") == model.get("run", "")]
    if len(runs) > 1:
        return RUN_INKS[runs.index(model["run"]) % len(RUN_INKS)], MARKERS[own.index(model["name"]) % len(MARKERS)]
    trained = [other["name"] for other in report["models"] if other["iteration"]]
    if model["name"] not in trained:
        return ("base", "s") if model["name"] == own[0] else ("activation", "D")
    place = trained.index(model["name"])
    return f"i{round(1 + 5 * place / max(1, len(trained) - 1))}", ("o", "^", "v", "P", "X")[place % 5]


def few(found: Found) -> Found:
    """What one drawing has room for: the last model of each run, or models of one run from the first to the last."""
    last = {model.get("run", ""): (model, figures) for model, figures in found}
    if len(last) > 1:
        return list(last.values())[:MAX_LINES]
    step = (len(found) - 1) / (MAX_LINES - 1)
    return found if len(found) <= MAX_LINES else [found[round(place * step)] for place in range(MAX_LINES)]


def in_order(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of all rounds, the first one first (a file may have "10" before "2")."""
    return [figures["rounds"][number] for number in sorted(figures["rounds"], key=int)]


def last_of(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of the last round."""
    return figures["rounds"][str(len(figures["rounds"]))]


def point(x: float, figures: dict[str, Any], measure: Measure) -> Point:
    return Point(x, *(figures[name] * measure.scale for name in ("mean", "low", "high")))


def said(figures: dict[str, Any], measure: Measure) -> str:
    return cell(figures, measure.scale, measure.digits)


def value(figures: dict[str, Any], measure: Measure) -> str:
    return f"{figures['mean'] * measure.scale:.{measure.digits}f}"


def gains_of(figures: dict[str, Any], measure: Measure) -> dict[int, dict[str, float]]:
    """Gain over y1 by round, as far as measured; that of the last round always is."""
    own = {k: part["gain"][measure.name] for k, part in enumerate(in_order(figures), start=1) if "gain" in part}
    return own | ({len(figures["rounds"]): figures["gain"][measure.name]} if len(figures["rounds"]) > 1 else {})
