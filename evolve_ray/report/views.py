"""Lookups in report.json that the sections of the page share: models, splits, rounds, the measure, colours and markers."""

from typing import Any, NamedTuple

from evolve_ray.report.charts import MARKERS, Point, short
from evolve_ray.report.markup import cell

MAX_LINES = 6  # models in one drawing; the table below the drawing has all of them
MODEL_AXIS = "model (a number is an iteration)"
RUN_COLORS = "abcdef"
Evaluated = list[tuple[dict[str, Any], dict[str, Any]]]  # (model, its figures on one split)


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


def evaluated(report: dict[str, Any], split: str) -> Evaluated:
    """(model, its figures) of the models that were evaluated on a split."""
    pairs = [(model, model["splits"].get(split, {"rounds": {}})) for model in report["models"]]
    return [(model, figures) for model, figures in pairs if figures["rounds"]]


def measure_of(models: Evaluated) -> Measure:
    """Exact match if all models have it, else the reward."""
    return EXACT if all("exact_match" in figures["rounds"]["1"] for _, figures in models) else REWARD


def runs_of(report: dict[str, Any]) -> list[str]:
    """The labels of the compared runs; [""] for a report of one run."""
    return list(dict.fromkeys(model.get("run", "") for model in report["models"]))


def name_of(model: dict[str, Any]) -> str:
    label = f"{model['run']}: " if model.get("run") else ""
    return label + model["name"] + (" (rolled back)" if model.get("rolled_back") else "")


def tick_of(model: dict[str, Any]) -> str:
    """The label of a model on the x axis: an iteration is its number alone."""
    return short(model["name"].removeprefix("iteration "), 11)


def color_and_marker(report: dict[str, Any], model: dict[str, Any]) -> tuple[str, str]:
    """(colour, marker) of a model, the same in every drawing: by iteration, or by run if several runs are compared."""
    runs = runs_of(report)
    same_run = [other["name"] for other in report["models"] if other.get("run", "") == model.get("run", "")]
    if len(runs) > 1:
        return RUN_COLORS[runs.index(model["run"]) % len(RUN_COLORS)], MARKERS[same_run.index(model["name"]) % len(MARKERS)]
    trained = [other["name"] for other in report["models"] if other["iteration"]]
    if model["name"] not in trained:
        return ("base", "s") if model["name"] == same_run[0] else ("activation", "D")
    place = trained.index(model["name"])
    return f"i{round(1 + 5 * place / max(1, len(trained) - 1))}", ("o", "^", "v", "P", "X")[place % 5]


def pick_for_drawing(models: Evaluated) -> Evaluated:
    """At most `MAX_LINES` models: the last one of each run, or of a single run evenly spaced from the first to the last."""
    last = {model.get("run", ""): (model, figures) for model, figures in models}
    if len(last) > 1:
        return list(last.values())[:MAX_LINES]
    step = (len(models) - 1) / (MAX_LINES - 1)
    return models if len(models) <= MAX_LINES else [models[round(place * step)] for place in range(MAX_LINES)]


def rounds_in_order(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of all rounds, the first round first (in a file "10" may come before "2")."""
    return [figures["rounds"][number] for number in sorted(figures["rounds"], key=int)]


def last_round(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of the last round."""
    return figures["rounds"][str(len(figures["rounds"]))]


def point(x: float, figures: dict[str, Any], measure: Measure) -> Point:
    return Point(x, *(figures[name] * measure.scale for name in ("mean", "low", "high")))


def interval_text(figures: dict[str, Any], measure: Measure) -> str:
    """`mean [low, high]` in the unit of the measure."""
    return cell(figures, measure.scale, measure.digits)


def mean_text(figures: dict[str, Any], measure: Measure) -> str:
    """The mean in the unit of the measure."""
    return f"{figures['mean'] * measure.scale:.{measure.digits}f}"


def gains_of(figures: dict[str, Any], measure: Measure) -> dict[int, dict[str, float]]:
    """`{round: gain over y1}` of the rounds whose gain was measured; the gain of the last round always was."""
    gains = {k: part["gain"][measure.name] for k, part in enumerate(rounds_in_order(figures), start=1) if "gain" in part}
    return gains | ({len(figures["rounds"]): figures["gain"][measure.name]} if len(figures["rounds"]) > 1 else {})
