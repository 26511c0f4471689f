"""What the panels of the Grafana dashboard show, asked of a Prometheus without Grafana:
`python cluster/panels.py http://127.0.0.1:9090 [--minutes 30] [--picture panels.png]`.

Prints every panel with its number of series, and draws them; exit code 1 when a panel of the dashboard has none.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

STEPS = 120  # points of a curve
LABELS = ("stage", "state", "kind", "pool", "figure", "model", "split", "round")  # what tells the curves of a panel apart
LISTED = 8  # curves that a legend names
VARIABLES = {"$run": ".*", "$SessionName": ".*", "$window": "1m"}  # what Grafana puts in their place at the start


def ask(prometheus: str, expression: str, minutes: float) -> list[dict]:
    """The series of an expression: each {"metric": labels, "values": [[time, text], ...]}."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    now = time.time()
    span = {"query": expression, "start": now - 60 * minutes, "end": now, "step": 60 * minutes / STEPS}
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(span)}", timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def draw(panels: list[tuple[str, list[dict]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 3
    figure, axes = pyplot.subplots(-(-len(panels) // columns), columns, figsize=(18, 3.2 * -(-len(panels) // columns)))
    for axis, (title, series) in zip(axes.flat, panels, strict=False):
        axis.set_title(title)
        for number, one in enumerate(series):
            shown = {name: value for name, value in one["metric"].items() if name in LABELS}
            label = " ".join(shown.values()) if number < LISTED else None
            times = [(float(at) - time.time()) / 60 for at, _ in one["values"]]
            axis.plot(times, [float(value) for _, value in one["values"]], label=label, marker=".")
        axis.set_xlabel("minutes from now")
        if series and any(name in LABELS for name in series[0]["metric"]):
            more = f"and {len(series) - LISTED} more" if len(series) > LISTED else None
            axis.legend(fontsize=6, loc="upper left", title=more, title_fontsize=6)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description="What the panels of the Grafana dashboard show, without Grafana.")
    parser.add_argument("prometheus", help="its address, such as http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=30, help="how far back to look (default: 30)")
    parser.add_argument("--picture", type=Path, help="a PNG file for the panels")
    given = parser.parse_args()
    dashboard = json.loads((Path(__file__).parent / "grafana/evolve-ray.json").read_bytes())
    panels = []
    for panel in dashboard["panels"]:
        try:
            series = [one for target in panel["targets"] for one in ask(given.prometheus, target["expr"], given.minutes)]
        except (urllib.error.URLError, KeyError, ValueError) as error:
            print(f"error: {given.prometheus}: {error}", file=sys.stderr)
            return 2
        panels.append((panel["title"], series))
        print(f"{len(series):4} series  {panel['title']}")
    if given.picture:
        draw(panels, given.picture)
    return 0 if all(series for _, series in panels) else 1


if __name__ == "__main__":
    sys.exit(main())
