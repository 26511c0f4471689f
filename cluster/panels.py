"""Shows the panels of a Grafana dashboard without Grafana, with data from Prometheus:
`python cluster/panels.py http://127.0.0.1:9090 [--minutes 30] [--picture panels.png] [--dashboard evolve-ray-serve]`.

Prints the number of series of every panel, and draws them; the exit code is 1 if a panel has no series.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

GRAFANA = Path(__file__).parent / "grafana"
DASHBOARDS = sorted(path.stem for path in GRAFANA.glob("*.json"))
STEPS = 120  # points per curve
LABELS = (
    "stage",
    "state",
    "kind",
    "pool",
    "figure",
    "model",
    "split",
    "round",
    "status",
    "reason",
    "effect",
)  # labels that distinguish the curves of a panel
MAX_LEGEND = 8  # curves that a legend lists
VARIABLES = {"$run": ".*", "$SessionName": ".*", "$window": "1m"}  # values that Grafana uses at the start


def query(prometheus: str, expression: str, minutes: float) -> list[dict]:
    """Returns the series of an expression, each {"metric": labels, "values": [[time, text], ...]}."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    now = time.time()
    span = {"query": expression, "start": now - 60 * minutes, "end": now, "step": 60 * minutes / STEPS}
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(span)}", timeout=30) as response:
        return json.load(response)["data"]["result"]


def draw(panels: list[tuple[str, list[dict]]], path: Path) -> None:
    """Draws the panels, (title, series) each, to an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 3
    figure, axes = pyplot.subplots(-(-len(panels) // columns), columns, figsize=(18, 3.2 * -(-len(panels) // columns)))
    for axis, (title, series) in zip(axes.flat, panels, strict=False):
        axis.set_title(title)
        for number, curve in enumerate(series):
            labels = {name: value for name, value in curve["metric"].items() if name in LABELS}
            label = " ".join(labels.values()) if number < MAX_LEGEND else None
            times = [(float(at) - time.time()) / 60 for at, _ in curve["values"]]
            axis.plot(times, [float(value) for _, value in curve["values"]], label=label, marker=".")
        axis.set_xlabel("minutes from now")
        if series and any(name in LABELS for name in series[0]["metric"]):
            more = f"and {len(series) - MAX_LEGEND} more" if len(series) > MAX_LEGEND else None
            axis.legend(fontsize=6, loc="upper left", title=more, title_fontsize=6)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> int:
    """Runs the command and returns its exit code: 1 if a panel has no series, 2 if Prometheus does not answer."""
    parser = argparse.ArgumentParser(description="Shows the panels of the Grafana dashboard without Grafana.")
    parser.add_argument("prometheus", help="the address of Prometheus, such as http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=30, help="how many minutes to show, up to now (default: 30)")
    parser.add_argument("--picture", type=Path, help="the PNG file to draw the panels to")
    parser.add_argument("--dashboard", choices=DASHBOARDS, default="evolve-ray", help="a file of cluster/grafana")
    args = parser.parse_args()
    dashboard = json.loads((GRAFANA / f"{args.dashboard}.json").read_bytes())
    panels = []
    for panel in dashboard["panels"]:
        try:
            series = [curve for target in panel["targets"] for curve in query(args.prometheus, target["expr"], args.minutes)]
        except (urllib.error.URLError, KeyError, ValueError) as error:
            print(f"error: {args.prometheus}: {error}", file=sys.stderr)
            return 2
        panels.append((panel["title"], series))
        print(f"{len(series):4} series  {panel['title']}")
    if args.picture:
        draw(panels, args.picture)
    return 0 if all(series for _, series in panels) else 1


if __name__ == "__main__":
    sys.exit(main())
