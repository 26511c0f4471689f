"""evaluation.json, evaluation.html and the tables on the terminal: models side by side."""

import json
from collections.abc import Iterator
from typing import Any

from evolve_ray.report import costs
from evolve_ray.report.ledger import compute
from evolve_ray.report.markup import cell, document, escape, section, table
from evolve_ray.report.tables import aligned, table_rows
from evolve_ray.store.files import write_atomic
from evolve_ray.store.run import Run

Table = tuple[str, list[str], list[list[str]]]  # title, header, lines
MEASURES = (("exact_match", "exact match %", 100.0, 1), ("reward", "reward", 1.0, 3))
BUDGETS = (("equal_samples", "equal samples"), ("equal_tokens", "equal tokens"))


def write(folder: Run, found: dict[str, Any]) -> None:
    """Writes evaluation.json and evaluation.html."""
    write_atomic(folder.root / "evaluation.json", json.dumps(found, indent=1, ensure_ascii=False).encode())
    write_atomic(folder.root / "evaluation.html", page(found).encode())


def tables(found: dict[str, Any]) -> list[Table]:
    """All tables, those without lines left out."""
    all_of = [
        ("By round, with 95 % bootstrap intervals", *table_rows(found)),
        ("Paired differences on the same prompts", *difference_rows(found)),
        ("From the first round to the last", *move_rows(found)),
        ("Probes", ["split", "probe", "model", "measure", "first", "second", "difference", "n"], probe_rows(found)),
    ]
    return [one for one in all_of if one[2]]


def difference_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """model minus model at each round and in gain."""
    rounds = max((len(split["rounds"]) for pair in found["differences"] for split in pair["splits"].values()), default=0)
    header = ["split", "difference", "measure", *(f"y{number}" for number in range(1, rounds + 1)), f"y{rounds} - y1", "n"]
    lines = []
    for pair in found["differences"]:
        for split, figures in pair["splits"].items():
            for measure, title, scale, digits in MEASURES:
                if figures["rounds"] and measure in figures["gain"]:
                    cells = [cell(values[measure], scale, digits) for values in figures["rounds"].values()]
                    cells += [""] * (rounds - len(cells)) + [cell(figures["gain"][measure], scale, digits)]
                    lines.append([split, f"{pair['model']} - {pair['against']}", title, *cells, str(figures["n"])])
    return header, sorted(lines, key=lambda line: line[0])


def move_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What refinement did to the answers between the first round and the last, and what the last round is like."""
    header = ["split", "model", "wrong->right", "right->wrong", "kept right", "kept wrong", "no change %", "tokens y1",
              "tokens last", "distinct-1", "distinct-2", "like previous", "like chain", "cut"]  # fmt: skip
    lines = []
    for split, model, figures in by_split(found):
        first, last = figures["rounds"]["1"], list(figures["rounds"].values())[-1]
        if last is first:
            continue
        moved = last["against_first"]
        counts = [str(moved.get(name, "")) for name in ("wrong_to_right", "right_to_wrong", "kept_right", "kept_wrong")]
        lengths = [f"{part['mean_response_tokens']:.1f}" for part in (first, last)]
        shares = [f"{last[name]:.3f}" for name in ("distinct_1", "distinct_2", "similarity_previous", "similarity_chain")]
        lines.append([split, model, *counts, f"{100 * last['no_change']:.1f}", *lengths, *shares, str(last["num_cut"])])
    return header, lines


def by_split(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(split, model, figures), splits first, of those with whole chains."""
    for split in dict.fromkeys(name for model in found["models"] for name in model["splits"]):
        for model in found["models"]:
            figures = model["splits"].get(split)
            if figures and figures["rounds"]:
                yield split, model["name"], figures


def probe_rows(found: dict[str, Any]) -> list[list[str]]:
    """One line for each probe, model and measure: what is compared, and the paired difference second minus first."""
    lines = []
    for split, model, figures in by_split(found):
        made = figures["probes"]
        for title, size, first, second, difference in comparisons(made, found["foreign"]):
            for measure, name, scale, digits in MEASURES:
                if measure in difference:
                    sides = [cell(side[measure], scale, digits) if side else "" for side in (first, second)]
                    lines.append([split, title, model, name, *sides, cell(difference[measure], scale, digits), str(size)])
        for measure, name in (("kept", "kept correct %"), ("unchanged", "unchanged %")):
            if made.get("keep", {}).get(measure):
                shares = ["", cell(made["keep"][measure], 100.0), ""]
                lines.append([split, "correct draft", model, name, *shares, str(made["keep"]["n"])])
        if made.get("longer", {}).get("n"):
            part = made["longer"]
            sides = [f"{part[side]['mean_tokens']:.1f}" for side in ("answer", "chain")]
            lines.append([split, "one longer answer, last round: cost", model, "generated tokens", *sides, "", str(part["n"])])
        for budget, title in BUDGETS if made.get("parallel", {}).get("n") else ():
            part = made["parallel"][budget]
            for measure, name in (("mean_tokens", "generated tokens"), ("mean_prompt_tokens", "prompt tokens")):
                sides = [f"{part[side][measure]:.1f}" for side in ("parallel", "chain")]
                lines.append([split, f"parallel, chain at {title}: cost", model, name, *sides, "", str(made["parallel"]["n"])])
    order = list(dict.fromkeys((line[0], line[1]) for line in lines))  # the models of one probe stand together
    splits = list(dict.fromkeys(line[0] for line in lines))
    return sorted(lines, key=lambda line: (splits.index(line[0]), order.index((line[0], line[1])), line[3]))


def comparisons(made: dict[str, Any], foreign: str | None) -> Iterator[tuple[str, int, Any, Any, dict]]:
    """(title, n, first, second, second minus first) of the probes that have such a form."""
    if made.get("foreign", {}).get("n"):
        part = made["foreign"]
        yield f"foreign draft ({foreign}): before, after", part["n"], part["before"], part["after"], part["difference"]
    for group in made.get("quality", []):
        if group["n"]:
            yield f"y_last - y1 where {group['group']}", group["n"], None, None, group["gain"]
    if made.get("majority", {}).get("n"):
        part = made["majority"]
        title = f"last round, vote of the last {part['rounds']}"
        yield title, part["n"], part["last"], part["vote"], part["difference"]
    if made.get("longer", {}).get("n"):
        part = made["longer"]
        title = f"one answer of up to {part['max_tokens']} tokens, last round"
        yield title, part["n"], part["answer"], part["chain"], part["difference"]
    if made.get("parallel", {}).get("n"):
        for budget, title in BUDGETS:
            part, size = made["parallel"][budget], made["parallel"]["n"]
            one, other, apart = part["parallel"], part["chain"], part["difference"]
            yield f"parallel, chain at {title}: scorer's best", size, one["best"], other["best"], apart["best"]
            yield f"parallel, chain at {title}: vote, last round", size, one["vote"], other["last"], apart["last_minus_vote"]


def text(found: dict[str, Any]) -> str:
    """All tables for the terminal."""
    return "\n\n".join(f"{title}\n" + "\n".join(aligned(header, lines)) for title, header, lines in tables(found))


def page(found: dict[str, Any]) -> str:
    """evaluation.html: the same tables as one page that loads nothing."""
    models = [[model["name"], model["path"], model["model"][:12]] for model in found["models"]]
    parts = [section("models", "Models", "", table(["model", "folder", "content hash"], models))]
    for place, (title, header, lines) in enumerate(tables(found)):
        parts.append(section(f"table{place}", title, "", table(header, lines)))
    shown = [{**model, "iteration": place} for place, model in enumerate(found["models"])]  # the curves' colours
    parts.append(costs.compute({"models": shown, "compute": compute(shown)}))
    names = ", ".join(model["name"] for model in found["models"])
    return document(names, f"<h1>{escape(names)}</h1>{''.join(parts)}")
