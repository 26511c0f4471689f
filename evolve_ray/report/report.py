"""Writes report.json and report.html: what a run did, and whether refinement improved."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from evolve_ray.report import chains, page
from evolve_ray.report.ledger import committed_stages, compute, ledger, wall_seconds
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


class PageWriter:
    """Draws pages in a thread while the run goes on, one at a time; the next call or `wait` raises the error of a drawing."""

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
    """Writes report.json and report.html and returns the report; `models` are all evaluated models in order, with summaries.

    `checkpoint` is the policy of the run: that of the last model that was not rolled back. `later` is called with the function
    that draws the page and writes both files, which takes about a second.
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
    path = run.root / "report.json"
    if not (path.exists() and path.read_bytes() == data and (run.root / "report.html").exists()):
        snapshot = json.loads(data)  # a copy: `models` goes on changing while the page is drawn

        def draw() -> None:
            write_page(run, snapshot)  # first, so that a report.json always has its page
            write_atomic(path, data)

        later(draw)
    return report


def write_page(run: Run, report: dict[str, Any], path: Path | None = None) -> None:
    """Writes the page of a report to `path`, or to RUN/report.html."""
    text = page.render(report, page.rejected_counts(run), chains.collect(run, report["models"]))
    write_atomic(path or run.root / "report.html", text.encode())
