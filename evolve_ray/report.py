"""report.json, report.html and the table on the terminal: what a run did and whether refinement got better."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from evolve_ray import chains, page
from evolve_ray.ledger import committed_stages, compute, ledger, wall_seconds
from evolve_ray.markup import cell
from evolve_ray.store.files import write_atomic
from evolve_ray.store.rows import read_jsonl
from evolve_ray.store.run import Run


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """One line per committed stage: rows in, out and rejected, tokens, and the seconds of all attempts."""
    seconds = wall_seconds(read_jsonl(run.root / "events.jsonl"))
    return [
        {"iteration": number, "stage": name, "seconds": round(seconds[number, name], 3), **manifest.stats}
        for number, manifest in committed_stages(run)
        for name in [manifest.folder.name]
    ]


class Aside:
    """Draws a page while the run goes on, one after the other. What goes wrong comes up at the next one or in `wait`."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.drawing: Future[None] | None = None

    def __call__(self, draw: Callable[[], None]) -> None:
        self.wait()
        self.drawing = self.thread.submit(draw)

    def wait(self) -> None:
        if self.drawing:
            self.drawing.result()


def write(
    run: Run, config: dict, models: list[dict[str, Any]], later: Callable[[Callable[[], None]], None] = lambda draw: draw()
) -> dict[str, Any]:
    """Writes report.json and report.html; `models` lists every evaluated model in order, with its summary.

    `checkpoint` is the policy that the run has come to: of the last model that was not rolled back. `later` is given what draws
    the page and writes both, a second's work.
    """
    report = {
        "name": config["name"],
        "run": str(run.root),
        "config": config,
        "checkpoint": [model["path"] for model in models if not model.get("rolled_back")][-1],
        "models": models,
        "compute": compute(models),
        "stages": stage_rows(run),
        "ledger": ledger(run, config["engine"]["actors"]),
    }
    data = json.dumps(report, indent=1, ensure_ascii=False).encode()
    written = run.root / "report.json"
    if not (written.exists() and written.read_bytes() == data and (run.root / "report.html").exists()):
        now = json.loads(data)  # as it is: what it is made of goes on changing

        def draw() -> None:
            write_page(run, now)  # first: a report.json that is there has its page beside it
            write_atomic(written, data)

        later(draw)
    return report


def write_page(run: Run, report: dict[str, Any], path: Path | None = None) -> None:
    """Writes the page of a report, to RUN/report.html unless `path` says where."""
    text = page.render(report, page.rejected_counts(run), chains.collect(run, report["models"]))
    write_atomic(path or run.root / "report.html", text.encode())


def table_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The headline table: model x split x measure, a column per round, and the paired gain of the last over the first."""
    rounds = max((len(split["rounds"]) for model in report["models"] for split in model["splits"].values()), default=0)
    header = ["split", "model", "measure", *(f"y{number}" for number in range(1, rounds + 1)), f"y{rounds} - y1", "n"]
    lines = []
    for split in dict.fromkeys(name for model in report["models"] for name in model["splits"]):
        for measure, title, scale, digits in (("exact_match", "exact match %", 100.0, 1), ("reward", "reward", 1.0, 3)):
            for model in report["models"]:
                figures = model["splits"].get(split, {"rounds": {}})
                if not figures["rounds"] or measure not in figures["rounds"]["1"]:
                    continue
                cells = [cell(values[measure], scale, digits) for values in figures["rounds"].values()]
                cells += [""] * (rounds - len(cells))
                size = str(figures["rounds"]["1"]["n"])
                name = model["name"] + (" (rolled back)" if model.get("rolled_back") else "")
                lines.append([split, name, title, *cells, cell(figures["gain"][measure], scale, digits), size])
    return header, lines


def table(report: dict[str, Any]) -> str:
    """The headline table as text, a blank line between splits and measures."""
    header, lines = table_rows(report)
    out, before = [], None
    for line, text in zip([header, *lines], aligned(header, lines), strict=True):
        group = (line[0], line[2])
        out += ["", text] if before not in (None, group) else [text]
        before = group
    return "\n".join(out)


def aligned(header: list[str], lines: list[list[str]]) -> list[str]:
    """Header and lines with columns under each other."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in [header, *lines]]
