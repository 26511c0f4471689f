"""The difficulty of each instruction for the length control of AlpacaEval 2, found by the instruction, not by its line.

The package finds a difficulty by the row number of the instruction in its table, `df_gamed.csv`. That table has no texts but an
`index`: the position of the instruction in AlpacaEval's own file.
"""

import contextlib
import csv
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError, first_line
from evolve_ray.store.files import write_atomic

# Of each of AlpacaEval's instructions, in the order of its file: the first 8 hexadecimal digits of the sha256 of the text, by
# which a file in another order is put right without the texts.
OFFICIAL = {
    digits: place for place, digits in enumerate(Path(__file__).with_name("alpaca_instructions.txt").read_text("utf-8").split())
}
NEEDED = ("model", "index", "instruction_difficulty", "preference", "std_delta_len", "not_gamed_baseline")


def official_place(instruction: str) -> int | None:
    """The position of an instruction in AlpacaEval's own file; None if it is not there."""
    return OFFICIAL.get(hashlib.sha256(instruction.encode()).hexdigest()[:8])


def difficulty_table(
    control: str, gamed: str | None, reference: list[dict], asked: list[str], root: Path, say: Callable[[str], None]
) -> tuple[Path | None, list[dict]]:
    """(the table for the package or None, the reference in a fixed order with the `index` of each row in the table).

    `asked` are the evaluated prompts in their order. The order of the reference's lines decides nothing: difficulty goes by the
    instruction, and the fit gets its rows in the order of the table. Everything is checked before the first request to the judge,
    because verdicts cost money.
    """
    if control != "v1":
        texts = dict.fromkeys([*asked, *sorted(row["instruction"] for row in reference)])
        place_of = {text: place for place, text in enumerate(texts)}
        ordered = in_order(reference, place_of)
        if control == "none":
            return None, ordered
        # Its formula uses no difficulty, but the package looks one up for every instruction.
        table = [{"index": place, "instruction_difficulty": 0.0} for place in range(len(place_of))]
        return write_table(root / "no-difficulty.csv", [{"model": "none", **row} for row in table]), ordered
    path = Path(gamed) if gamed else download(reference)
    table = read_table(path)
    place_of = places(path, table, reference, asked, say)
    missing = [name for name in NEEDED if name not in table[0]]
    if missing:
        raise UserError(f"--gamed {path}: has no column {', '.join(missing)}; the table of the package has {', '.join(NEEDED)}")
    return write_table(root / "difficulty.csv", with_first_rows_first(table)), in_order(reference, place_of)


def in_order(reference: list[dict], place_of: dict[str, int]) -> list[dict]:
    """The reference by place; of two rows with one instruction, by their outputs."""
    rows = [{**row, "index": place_of[row["instruction"]]} for row in reference]
    return sorted(rows, key=lambda row: (row["index"], row["output"]))


def download(reference: list[dict]) -> Path:
    """The table of AlpacaEval's own instructions, from the hub."""
    unknown = sum(official_place(row["instruction"]) is None for row in reference)
    if unknown:
        raise UserError(
            f"--length-control v1: needs the difficulty of every instruction; only those of AlpacaEval's {len(OFFICIAL)} are "
            f"published, but the reference has {unknown}; use --length-control minimal, or give them with --gamed FILE"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download("tatsu-lab/alpaca_eval", "df_gamed.csv", repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds; here all concern this file
        raise UserError(
            "--gamed: is missing, and df_gamed.csv of the dataset tatsu-lab/alpaca_eval cannot be downloaded: "
            f"{first_line(error)}; give that file with --gamed, or use --length-control minimal"
        ) from None


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of the table; each has an `index`."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table: list[dict[str, Any]] = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--gamed {path}: cannot be read as a CSV table with a column `index`: {error}") from None
    if not table or "index" not in table[0]:
        raise UserError(f"--gamed {path}: cannot be read as a CSV table with a column `index`: it has no such column or no rows")
    return table


def places(
    path: Path, table: list[dict[str, Any]], reference: list[dict], asked: list[str], say: Callable[[str], None]
) -> dict[str, int]:
    """`{instruction: index in the table}`.

    By the table's column `instruction`; without one by AlpacaEval's own order, if table and instructions are AlpacaEval's; else
    the table counts the evaluated prompts, and that is said.
    """
    texts = list(dict.fromkeys(row["instruction"] for row in reference))
    indexes = list(dict.fromkeys(row["index"] for row in table))
    if "instruction" in table[0]:
        number = {index: place for place, index in enumerate(indexes)}
        place_of = {row["instruction"]: number[row["index"]] for row in table}
        lost = [text for text in texts if text not in place_of]
        if lost:
            raise UserError(f"--gamed {path}: has no row for {len(lost)} instructions of the reference, first {lost[0][:60]!r}")
        return place_of
    official = {text: place for text in texts if (place := official_place(text)) is not None}
    if len(indexes) == len(OFFICIAL) and len(official) == len(texts):
        place_of = official
    else:
        place_of = {text: place for place, text in enumerate(asked)}
        if len(reference) != len(asked) or any(text not in place_of for text in texts):
            raise UserError(
                f"--gamed {path}: has no column `instruction`, and the reference and the evaluation do not have the same "
                "instructions, once each, so that nothing tells which difficulty is whose; add that column"
            )
    size = len(OFFICIAL) if place_of is official else len(place_of)
    if indexes[:size] != [str(index) for index in range(size)]:
        raise UserError(
            f"--gamed {path}: must begin with the instructions 0 to {size - 1} of the reference, in the order in which they were "
            "evaluated, or have a column `instruction`"
        )
    if place_of is not official:
        say(f"{path} has no column `instruction`: its difficulties are taken for the evaluated prompts, in their order")
    return place_of


def with_first_rows_first(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with one row of every index first, in order: the package takes the row number for the index."""
    first: dict[str, dict] = {}
    others = []
    for row in table:
        if first.setdefault(row["index"], row) is not row:
            others.append(row)
    number = {index: place for place, index in enumerate(first)}
    return [{**row, "index": number[row["index"]]} for row in (*first.values(), *others)]


def write_table(path: Path, table: list[dict[str, Any]]) -> Path:
    text = io.StringIO()
    columns = [name for name in table[0] if name != "instruction"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomic(path, text.getvalue().encode())
    return path


@contextlib.contextmanager
def difficulties_from(table: Path | None) -> Iterator[None]:
    """Makes the package read `table`; by default it downloads its table of difficulties at every call."""
    from alpaca_eval.metrics import glm_winrate

    download = glm_winrate.hf_hub_download
    glm_winrate.hf_hub_download = lambda **_: str(table)
    try:
        yield
    finally:
        glm_winrate.hf_hub_download = download
