"""report.json, report.html and the table on the terminal: what a run did and whether refinement got better."""

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
