"""The headline table: split x measure x model, a column for each round."""

from typing import Any

from evolve_ray.report.markup import cell


def table_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, lines) of the headline table: a line per split, measure and model; columns per round, and the paired gain."""
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
    """The headline table as text, with a blank line between splits and measures."""
    header, lines = table_rows(report)
    printed, previous = [], None
    for line, text in zip([header, *lines], aligned(header, lines), strict=True):
        group = (line[0], line[2])
        printed += ["", text] if previous not in (None, group) else [text]
        previous = group
    return "\n".join(printed)


def aligned(header: list[str], lines: list[list[str]]) -> list[str]:
    """Header and lines as text with aligned columns."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in [header, *lines]]
