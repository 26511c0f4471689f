"""The drawings of a page: inline SVG from matplotlib. Text stays text, and colours follow the reader's light or dark scheme.

matplotlib draws with placeholder colours. `inline` then replaces each of them by the style sheet's variable of that colour,
turns styles into attributes (the page forbids inline styles), and makes the ids unique to the drawing.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from xml.etree import ElementTree

from evolve_ray.report.markup import COLORS, clean, escape

WIDTH = 3.5  # inches; the page scales a drawing to its box
PLACEHOLDERS = {name: f"#0100{place:02x}" for place, name in enumerate(COLORS)}
VARIABLES = {color: f"var(--{name})" for name, color in PLACEHOLDERS.items()} | {"#000000": "currentColor"}
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
MARKS = {"o": "M3 0A3 3 0 1 1-3 0A3 3 0 1 1 3 0", "^": "M-3.4 3L3.4 3L0-3.4Z", "s": "M-3-3H3V3H-3Z", "D": "M0-4L4 0L0 4L-4 0Z",
         "v": "M-3.4-3L3.4-3L0 3.4Z", "P": "M-1.2-3.5H1.2V-1.2H3.5V1.2H1.2V3.5H-1.2V1.2H-3.5V-1.2H-1.2Z",
         "X": "M-3.4-2L-2-3.4L0-1.4L2-3.4L3.4-2L1.4 0L3.4 2L2 3.4L0 1.4L-2 3.4L-3.4 2L-1.4 0Z"}  # fmt: skip


class Point(NamedTuple):
    x: float
    mean: float
    low: float
    high: float


class Series(NamedTuple):
    label: str
    color: str
    marker: str
    points: list[Point]
    dashed: bool = False


class Move(NamedTuple):
    """Prompts of one model that refinement made better, made worse, or did not change."""

    label: str
    better: int
    worse: int
    kept: int


def short(text: Any, length: int = 16, tail: int = 0) -> str:
    """A label for an axis: one line, no control characters; a long one has an ellipsis before its last `tail` characters."""
    plain = " ".join(clean(text).split())
    if len(plain) <= length:
        return plain
    return plain[: length - 1 - tail] + "\N{HORIZONTAL ELLIPSIS}" + plain[len(plain) - tail :]


def lines(name: str, alt: str, series: list[Series], ticks: list[str] | None, *, x: str = "", y: str = "") -> str:
    """Draws means with their intervals, over `ticks` (x is the index of a tick) or, without ticks, over a numeric axis from 0."""

    def paint(axes: Any) -> None:
        for place, part in enumerate(series):
            offset = 0.0 if ticks is None else 0.09 * (place - (len(series) - 1) / 2) / max(1, len(series) / 4)
            xs, means = [point.x + offset for point in part.points], [point.mean for point in part.points]
            bars = [[max(0.0, p.mean - p.low) for p in part.points], [max(0.0, p.high - p.mean) for p in part.points]]
            axes.errorbar(
                xs, means, yerr=bars, color=PLACEHOLDERS[part.color], marker=part.marker, markersize=4.0,
                linestyle=(0, (4, 2)) if part.dashed else "-", linewidth=1.2, elinewidth=0.8, capsize=1.5, capthick=0.8,
            )  # fmt: skip
        if ticks is None:
            axes.set_xlim(0.0, 1.06 * max(point.x for part in series for point in part.points))
        else:
            crowded = sum(map(len, ticks)) > 44
            axes.set_xticks(range(len(ticks)), ticks, rotation=40 if crowded else 0, ha="right" if crowded else "center")
            axes.set_xlim(-0.35, len(ticks) - 0.65)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y", color=PLACEHOLDERS["grid"], linewidth=0.6)

    return draw(name, alt, 2.3, paint)


def forest(name: str, alt: str, groups: list[Series], *, x: str = "") -> str:
    """Draws gains around zero: one row per model, one bar per round (`Point.x`); the last round has the strongest bar."""
    rows = [(group, point, place) for group in groups for place, point in enumerate(group.points)]

    def paint(axes: Any) -> None:
        axes.axvline(0.0, color="#000000", linewidth=0.8)
        height, heights, middles = 0.0, [], []
        for group in groups:
            middles.append(height + (len(group.points) - 1) / 2)
            for _ in group.points:
                heights.append(height)
                height += 1.0
            height += 0.7
        for (group, point, place), y in zip(rows, heights, strict=True):
            last = place == len(group.points) - 1
            axes.errorbar(
                [point.mean], [y], xerr=[[max(0.0, point.mean - point.low)], [max(0.0, point.high - point.mean)]],
                color=PLACEHOLDERS[group.color], marker=group.marker, markersize=5.0 if last else 3.2,
                elinewidth=1.6 if last else 0.8, capsize=2.0 if last else 0.0, alpha=1.0 if last else 0.65,
            )  # fmt: skip
        axes.set_yticks(middles, [short(group.label, 22, 12) for group in groups])
        axes.set_ylim(height - 0.4, -0.8)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x)
        axes.grid(axis="x", color=PLACEHOLDERS["grid"], linewidth=0.6)

    return draw(name, alt, 0.75 + 0.11 * len(rows) + 0.16 * len(groups), paint)


def stacks(name: str, alt: str, labels: list[str], parts: list[Series], *, x: str = "") -> str:
    """Draws one bar for each label, from its parts side by side: `parts` have a point for each label, with its length as mean."""

    def paint(axes: Any) -> None:
        ends = [0.0] * len(labels)
        for part in parts:
            lengths = [point.mean for point in part.points]
            axes.barh(range(len(labels)), lengths, left=ends, height=0.62, color=PLACEHOLDERS[part.color])
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        axes.set_yticks(range(len(labels)), [short(label) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x)
        axes.grid(axis="x", color=PLACEHOLDERS["grid"], linewidth=0.6)

    return draw(name, alt, 0.6 + 0.26 * len(labels), paint)


def moves(name: str, alt: str, rows: list[Move], *, better: str, worse: str) -> str:
    """Draws bars to the right for prompts that became better, to the left for those that became worse, with their counts."""

    def paint(axes: Any) -> None:
        widest = max(1, max(max(row.better, row.worse) for row in rows))
        for place, row in enumerate(rows):
            axes.barh(place, row.better, height=0.62, color=PLACEHOLDERS["right"])
            axes.barh(place, -row.worse, height=0.62, color=PLACEHOLDERS["wrong"])
            for value, count, side in ((row.better, row.better, "left"), (-row.worse, row.worse, "right")):
                pad = 0.03 * widest * (1 if side == "left" else -1)
                axes.text(value + pad, place, f"{count:,}", ha=side, va="center", fontsize=8)
        axes.axvline(0.0, color="#000000", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [short(row.label, 22, 12) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -1.1)
        axes.set_xlim(-1.35 * widest, 1.35 * widest)
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        for text, x, side in ((f"\N{LEFTWARDS ARROW} {worse}", -0.06, "right"), (f"{better} \N{RIGHTWARDS ARROW}", 0.06, "left")):
            axes.text(x * widest, -0.75, text, ha=side, va="center", fontsize=8)
        axes.spines[["bottom", "left"]].set_visible(False)

    return draw(name, alt, 0.55 + 0.26 * len(rows), paint)


def key(series: list[Series]) -> str:
    """The legend, as HTML so that it wraps on a narrow screen."""
    parts = []
    for part in series:
        dash = ' stroke-dasharray="5 3"' if part.dashed else ""
        line = f'<path d="M-13 0H13" stroke="var(--{part.color})" stroke-width="1.8"{dash}/>'
        mark = f'<path d="{MARKS[part.marker]}" fill="var(--{part.color})"/>'
        sample = f'<svg viewBox="-14 -6 28 12" aria-hidden="true">{line}{mark}</svg>'
        parts.append(f"<span>{sample}{escape(part.label)}</span>")
    return f'<div class="key">{"".join(parts)}</div>'


def draw(name: str, alt: str, height: float, paint: Callable[[Any], None]) -> str:
    """One drawing as SVG. The same input gives the same bytes, whatever the user's matplotlib settings are."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 8.5, "axes.labelsize": 8.5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.unicode_minus": True,
    }  # fmt: skip
    file = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")  # the reader's font draws the text, not matplotlib's
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        drawing = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(drawing)
        axes = drawing.subplots()
        axes.set_axisbelow(True)
        paint(axes)
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline(file.getvalue(), name, alt)


def inline(svg: str, name: str, alt: str) -> str:
    """The SVG of a file as an element of the page."""
    root = ElementTree.fromstring(svg)
    used_ids = set(re.findall(r"#([A-Za-z][\w.]*)[\"')]", svg))

    def rebuilt(old: ElementTree.Element) -> ElementTree.Element:
        new = ElementTree.Element(old.tag.rpartition("}")[2])
        for attribute, value in old.attrib.items():
            local_name = attribute.rpartition("}")[2]
            if local_name == "style":
                for part in value.split(";"):
                    style, _, setting = (text.strip() for text in part.partition(":"))
                    if style != "font-family":
                        new.set(style, VARIABLES.get(setting, setting))
            elif local_name == "id":
                if value in used_ids:
                    new.set("id", f"{name}-{value}")
            elif local_name == "href":
                new.set("href", f"#{name}-{value[1:]}")
            elif local_name == "clip-path":
                new.set("clip-path", value.replace("#", f"#{name}-"))
            elif not (local_name == "transform" and value.startswith("rotate(-0 ")):
                new.set(local_name, " ".join(value.split()))
        new.text = old.text if old.text and old.text.strip() else None
        new.extend(rebuilt(part) for part in old if not part.tag.endswith(("}metadata", "}style")))
        return new

    element = rebuilt(root)
    element.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": clean(alt)}
    return ElementTree.tostring(element, encoding="unicode", short_empty_elements=False)
