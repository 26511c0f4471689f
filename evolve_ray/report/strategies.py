"""The table of strategies: the final answer of each, what it cost, and what it would be at the tokens of the chain."""

from typing import Any

from evolve_ray.report.markup import cell, section, table

HEADER = ["split", "model", "strategy", "pick", "measure", "final answer", "tokens", "minus chain", "at the chain's tokens",
          "tokens", "minus chain", "n"]  # fmt: skip
MEASURES = (("exact_match", "exact match %", 100.0, 1), ("reward", "reward", 1.0, 3))
TITLE = "Final answers of strategies, at all their tokens and at those of the chain"


def strategy_rows(models: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, lines) of the final answers of every strategy that was measured; tokens are those that all asks generated."""
    lines = []
    for split in dict.fromkeys(name for model in models for name in model["splits"]):
        for measure, title, scale, digits in MEASURES:
            for model in models:
                for entry in measured(model["splits"].get(split, {})):
                    if measure not in entry:
                        continue
                    sides = [entry, entry.get("at_chain_tokens", {})]
                    cells = [text for side in sides for text in side_cells(side, measure, scale, digits)]
                    lines.append([split, model["name"], entry["name"], entry["pick"], title, *cells, str(entry["n"])])
    return HEADER, lines


def side_cells(side: dict[str, Any], measure: str, scale: float, digits: int) -> list[str]:
    if measure not in side:
        return ["", "", ""]
    difference = cell(side["difference"][measure], scale, digits) if "difference" in side else ""
    return [cell(side[measure], scale, digits), f"{side['mean_tokens']:.1f}", difference]


def measured(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a split: of the run's own strategy, or of those that jobs/evaluate.py measured."""
    return figures.get("strategies", [figures["strategy"]] if "strategy" in figures else [])


def render(report: dict[str, Any]) -> str:
    """The section of the page; empty if no strategy was measured."""
    header, lines = strategy_rows(report["models"])
    text = (
        "The final answer of a strategy, with the generated tokens of all its asks: answers, critiques, verdicts. At the chain's "
        "tokens, a prompt gets as many responses of the strategy as the tokens of its chain pay for, at least one answer."
    )
    return section("strategies", "Final answers", text, table(header, lines)) if lines else ""
