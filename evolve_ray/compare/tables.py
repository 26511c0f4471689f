"""Writes evaluation.json and evaluation.html, and renders the same tables for the terminal."""

import json
from collections.abc import Iterator
from typing import Any

from evolve_ray.config.run_options import MIN_PROMPTS
from evolve_ray.report import costs
from evolve_ray.report.ledger import compute
from evolve_ray.report.markup import cell, document, escape, section, table
from evolve_ray.report.strategies import TITLE, strategy_rows
from evolve_ray.report.tables import aligned, table_rows
from evolve_ray.store.files import write_atomic
from evolve_ray.store.run import Run

Table = tuple[str, list[str], list[list[str]]]  # title, header, lines
MEASURES = (("exact_match", "exact match %", 100.0, 1), ("reward", "reward", 1.0, 3))
BUDGETS = (("equal_samples", "equal samples"), ("equal_tokens", "equal tokens"))


def write(folder: Run, evaluation: dict[str, Any]) -> None:
    """Writes evaluation.json and evaluation.html."""
    write_atomic(folder.root / "evaluation.json", json.dumps(evaluation, indent=1, ensure_ascii=False).encode())
    write_atomic(folder.root / "evaluation.html", page(evaluation).encode())


def tables(evaluation: dict[str, Any]) -> list[Table]:
    """Returns all tables that have lines."""
    all_tables = [
        (
            "By round, with 95 % intervals (Wilson's for shares and means, Tango's for paired differences)",
            *table_rows(evaluation),
        ),
        ("Paired differences on the same prompts", *difference_rows(evaluation)),
        ("From the first round to the last", *change_rows(evaluation)),
        (TITLE, *strategy_rows(evaluation["models"])),
        ("Probes", ["split", "probe", "model", "measure", "first", "second", "difference", "n"], probe_rows(evaluation)),
    ]
    return [part for part in all_tables if part[2]]


def difference_rows(evaluation: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of the differences between every two models, by round and in gain."""
    rounds = max(
        (len(split["rounds"]) for comparison in evaluation["differences"] for split in comparison["splits"].values()), default=0
    )
    header = ["split", "difference", "measure", *(f"y{number}" for number in range(1, rounds + 1)), f"y{rounds} - y1", "n"]
    lines = []
    for comparison in evaluation["differences"]:
        for split, figures in comparison["splits"].items():
            for measure, title, scale, digits in MEASURES:
                if figures["rounds"] and measure in figures["gain"]:
                    cells = [cell(values[measure], scale, digits) for values in figures["rounds"].values()]
                    cells += [""] * (rounds - len(cells)) + [cell(figures["gain"][measure], scale, digits)]
                    lines.append([split, f"{comparison['model']} - {comparison['against']}", title, *cells, str(figures["n"])])
    return header, sorted(lines, key=lambda line: line[0])


def change_rows(evaluation: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of what changed from the first round to the last, and of the style of the last round."""
    header = ["split", "model", "wrong->right", "right->wrong", "kept right", "kept wrong", "no change %", "tokens y1",
              "tokens last", "distinct-1", "distinct-2", "similarity to previous", "similarity in chain", "cut"]  # fmt: skip
    lines = []
    for split, model, figures in by_split(evaluation):
        first, last = figures["rounds"]["1"], list(figures["rounds"].values())[-1]
        if last is first:
            continue
        changes = last["against_first"]
        counts = [str(changes.get(name, "")) for name in ("wrong_to_right", "right_to_wrong", "kept_right", "kept_wrong")]
        lengths = [f"{part['mean_response_tokens']:.1f}" for part in (first, last)]
        shares = [f"{last[name]:.3f}" for name in ("distinct_1", "distinct_2", "similarity_previous", "similarity_chain")]
        lines.append([split, model, *counts, f"{100 * last['no_change']:.1f}", *lengths, *shares, str(last["num_cut"])])
    return header, lines


def by_split(evaluation: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (split, model, figures), split by split, for each model with complete chains."""
    for split in dict.fromkeys(name for model in evaluation["models"] for name in model["splits"]):
        for model in evaluation["models"]:
            figures = model["splits"].get(split)
            if figures and figures["rounds"]:
                yield split, model["name"], figures


def probe_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    """Returns a line for each probe, model and measure: the two sides, and their paired difference second minus first."""
    lines = []
    for split, model, figures in by_split(evaluation):
        probes = figures["probes"]
        for title, size, first, second, difference in comparisons(probes, evaluation["foreign"]):
            for measure, name, scale, digits in MEASURES:
                if measure in difference:
                    sides = [cell(side[measure], scale, digits) if side else "" for side in (first, second)]
                    lines.append([split, title, model, name, *sides, cell(difference[measure], scale, digits), str(size)])
        for measure, name in (("kept", "kept correct %"), ("unchanged", "unchanged %")):
            if probes.get("keep", {}).get(measure):
                shares = ["", cell(probes["keep"][measure], 100.0), ""]
                lines.append([split, "correct draft", model, name, *shares, str(probes["keep"]["n"])])
        if probes.get("longer", {}).get("n"):
            probe = probes["longer"]
            sides = [f"{probe[side]['mean_tokens']:.1f}" for side in ("answer", "chain")]
            lines.append([split, "one longer answer, last round: cost", model, "generated tokens", *sides, "", str(probe["n"])])
        for budget, title in BUDGETS if probes.get("parallel", {}).get("n") else ():
            probe = probes["parallel"][budget]
            for measure, name in (("mean_tokens", "generated tokens"), ("mean_prompt_tokens", "prompt tokens")):
                sides = [f"{probe[side][measure]:.1f}" for side in ("parallel", "chain")]
                lines.append([split, f"parallel, chain at {title}: cost", model, name, *sides, "", str(probes["parallel"]["n"])])
    order = list(dict.fromkeys((line[0], line[1]) for line in lines))  # keeps the models of one probe together
    splits = list(dict.fromkeys(line[0] for line in lines))
    return sorted(lines, key=lambda line: (splits.index(line[0]), order.index((line[0], line[1])), line[3]))


def comparisons(probes: dict[str, Any], foreign: str | None) -> Iterator[tuple[str, int, Any, Any, dict]]:
    """Yields (title, n, first, second, second minus first) of the probes that compare two sides."""
    if probes.get("foreign", {}).get("n"):
        part = probes["foreign"]
        yield f"foreign draft ({foreign}): before, after", part["n"], part["before"], part["after"], part["difference"]
    for group in probes.get("quality", []):
        if group["n"]:
            yield f"y_last - y1 where {group['group']}", group["n"], None, None, group["gain"]
    if probes.get("majority", {}).get("n"):
        part = probes["majority"]
        title = f"last round, vote of the last {part['rounds']}"
        yield title, part["n"], part["last"], part["vote"], part["difference"]
    if probes.get("longer", {}).get("n"):
        part = probes["longer"]
        title = f"one answer of up to {part['max_tokens']} tokens, last round"
        yield title, part["n"], part["answer"], part["chain"], part["difference"]
    if probes.get("parallel", {}).get("n"):
        for budget, title in BUDGETS:
            part, size = probes["parallel"][budget], probes["parallel"]["n"]
            drawn, chain, difference = part["parallel"], part["chain"], part["difference"]
            yield f"parallel, chain at {title}: scorer's best", size, drawn["best"], chain["best"], difference["best"]
            yield (
                f"parallel, chain at {title}: vote, last round",
                size,
                drawn["vote"],
                chain["last"],
                difference["last_minus_vote"],
            )


def warning(all_tables: list[Table]) -> str:
    """Returns a sentence if some line rests on too few prompts; empty otherwise."""
    sizes = [int(line[-1]) for _, header, lines in all_tables if header[-1] == "n" for line in lines]
    few = min(sizes, default=MIN_PROMPTS) < MIN_PROMPTS
    return f"Lines with n below {MIN_PROMPTS} rest on too few prompts: conclude nothing from them." if few else ""


def text(evaluation: dict[str, Any]) -> str:
    """Returns all tables as text for the terminal."""
    parts = tables(evaluation)
    shown = [f"{title}\n" + "\n".join(aligned(header, lines)) for title, header, lines in parts]
    return "\n\n".join([*shown, *filter(None, [warning(parts)])])


def page(evaluation: dict[str, Any]) -> str:
    """Returns evaluation.html: the same tables on one page that loads no other file."""
    models = [[model["name"], model["path"], model["model"][:12]] for model in evaluation["models"]]
    sections = [section("models", "Models", "", table(["model", "folder", "content hash"], models))]
    parts = tables(evaluation)
    for number, (title, header, lines) in enumerate(parts):
        sections.append(section(f"table{number}", title, warning([(title, header, lines)]), table(header, lines)))
    # A curve gets its colour from `iteration`.
    numbered = [{**model, "iteration": number} for number, model in enumerate(evaluation["models"])]
    sections.append(costs.compute({"models": numbered, "compute": compute(numbered)}))
    names = ", ".join(model["name"] for model in evaluation["models"])
    return document(names, f"<h1>{escape(names)}</h1>{''.join(sections)}")
