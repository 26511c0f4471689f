"""report.json, report.html and the table on the terminal: what a run did and whether refinement got better."""

import html
import json
from collections import defaultdict
from typing import Any

import numpy as np

from evolve_ray.rows import read_jsonl
from evolve_ray.store import Run, read_manifest, write_atomic

RESAMPLES = 2000


def interval(values: list[float], seed: int) -> dict[str, float]:
    """Mean with its 95 % percentile bootstrap interval (2,000 resamples of the prompts)."""
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for first in range(0, RESAMPLES, 200):  # in blocks, so that memory stays flat for many prompts
        means[first : first + 200] = data[generator.integers(len(data), size=(200, len(data)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(data.mean()), "low": float(low), "high": float(high)}


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """One line per committed stage: rows in, out and rejected, tokens, and the seconds that events recorded."""
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    for event in read_jsonl(run.root / "events.jsonl"):
        if event["event"] == "stage_end":
            seconds[event["iteration"], event["stage"]] += event["seconds"]
    lines = []
    for iteration in sorted(run.root.glob("iteration-*")):
        number = int(iteration.name.removeprefix("iteration-"))
        for folder in sorted(path.parent for path in iteration.glob("[!.]*/MANIFEST.json")):
            manifest = read_manifest(folder)
            assert manifest is not None
            name = folder.name
            lines.append({"iteration": number, "stage": name, "seconds": round(seconds[number, name], 3), **manifest.stats})
    return lines


def write(run: Run, config: dict, models: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes report.json and report.html; `models` lists every evaluated model in order, with its summary."""
    report = {"name": config["name"], "run": str(run.root), "config": config, "models": models, "stages": stage_rows(run)}
    write_atomic(run.root / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    write_atomic(run.root / "report.html", page(report).encode())
    return report


def cell(figures: dict[str, Any] | None, scale: float = 1.0, digits: int = 1) -> str:
    if figures is None:
        return ""
    mean, low, high = (figures[name] * scale for name in ("mean", "low", "high"))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


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
                lines.append([split, model["name"], title, *cells, cell(figures["gain"][measure], scale, digits), size])
    return header, lines


def table(report: dict[str, Any]) -> str:
    """The headline table as text."""
    header, lines = table_rows(report)
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    out, before = [], None
    for line in [header, *lines]:
        if before is not None and line[:1] + line[2:3] != before:
            out.append("")
        before = line[:1] + line[2:3]
        out.append("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    return "\n".join(out)


def page(report: dict[str, Any]) -> str:
    """report.html: the same tables as one page that needs no network."""

    def render(header: list[str], lines: list[list[str]]) -> str:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>" for line in lines)
        return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"

    keys = [
        "iteration",
        "stage",
        "seconds",
        "num_in",
        "num_rows",
        "num_rejected",
        "num_tokens",
        "num_prompt_tokens",
        "num_cached_tokens",
    ]
    stages = [[str(line.get(key, "")) for key in keys] for line in report["stages"]]
    style = (
        "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}"
        "td,th{border-bottom:1px solid #ccc;padding:.25rem .6rem;text-align:left;white-space:nowrap}"
    )
    name = html.escape(report["name"])
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{name} - evolve-ray</title><style>{style}</style><h1>{name}</h1>"
        f"<h2>By round, with 95 % bootstrap intervals</h2>{render(*table_rows(report))}"
        f"<h2>Stages</h2>{render(keys, stages)}</html>"
    )
