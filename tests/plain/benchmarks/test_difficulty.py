"""AlpacaEval's difficulties go by the instruction: the order of reference, table and questions changes no figure."""

import csv
import json
import random

import pytest

from evolve_ray.benchmarks import difficulty
from evolve_ray.errors import UserError
from tests.plain.benchmarks.examples import PROMPTS, judge_alpaca, results

MODELS = (("concise", -1), ("verbose", 1))
COLUMNS = ["model", "index", "instruction_difficulty", "preference", "std_delta_len", "not_gamed_baseline"]


def gamed_rows(by_model=True):
    """A table as the package's: of each of two gamed models a row for each instruction."""
    table = [
        {"model": model, "index": n, "instruction_difficulty": (-1) ** n * 0.4 + n / 7, "preference": 0.5 - 0.1 * sign,
         "std_delta_len": sign * (0.5 + 0.1 * n), "not_gamed_baseline": False}
        for model, sign in MODELS for n in range(len(PROMPTS))
    ]  # fmt: skip
    return table if by_model else sorted(table, key=lambda row: row["index"])


def write(path, table, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
    return str(path)


def shuffle_reference(place):
    outputs = json.loads((place / "reference.json").read_text())
    random.Random(3).shuffle(outputs)
    assert [row["instruction"] for row in outputs] != PROMPTS
    (place / "reference.json").write_text(json.dumps(outputs))


def share(messages):
    """Verdicts that differ by prompt."""
    text = messages[1]["content"]
    value = 0.15 + 0.1 * next(n for n, prompt in enumerate(PROMPTS) if f"{prompt}:" in text)
    return value if text.index('"m"') < text.index("round") < text.index('"M"') else 1 - value


@pytest.mark.parametrize("control", ["v1", "minimal"])
def test_order_of_the_reference_changes_no_rate(place, judge, control):
    pytest.importorskip("alpaca_eval")
    judge.decide = share
    more = ["--length-control", control, "--gamed", write(place / "gamed.csv", gamed_rows())]
    assert judge_alpaca(place, judge, *more) == 0
    before, asked = results(place), len(judge.asked)
    shuffle_reference(place)
    assert judge_alpaca(place, judge, *more) == 0
    for row, other in zip(results(place), before, strict=True):
        assert row == {name: pytest.approx(value) if isinstance(value, float) else value for name, value in other.items()}
    assert len(judge.asked) == asked, "the same verdicts are not bought again"
    written = json.loads((place / "out" / "reference.json").read_text())
    assert [(row["instruction"], row["index"]) for row in written] == [(prompt, n) for n, prompt in enumerate(PROMPTS)]


def settle(place, table, columns=COLUMNS, asked=PROMPTS, instructions=PROMPTS):
    """`{instruction: its difficulty by the row number that the package takes for the index}`."""
    reference = [{"instruction": text, "output": "o", "index": n} for n, text in enumerate(instructions)]
    path, ordered = difficulty.difficulty_table(
        "v1", write(place / "t.csv", table, columns), reference, list(asked), place, print
    )
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return {row["instruction"]: float(rows[row["index"]]["instruction_difficulty"]) for row in ordered}


TRUE = {prompt: (-1) ** n * 0.4 + n / 7 for n, prompt in enumerate(PROMPTS)}


def test_table_counts_the_evaluated_prompts_and_that_is_said(tmp_path, capsys):
    assert settle(tmp_path, gamed_rows()) == pytest.approx(TRUE)
    assert "t.csv has no column `instruction`: its difficulties are taken for the evaluated prompts" in capsys.readouterr().out
    assert settle(tmp_path, gamed_rows(), instructions=PROMPTS[::-1]) == pytest.approx(TRUE)


def test_rows_of_a_table_may_stand_model_by_model_or_instruction_by_instruction(tmp_path):
    """The package takes the row number for the index: in the second order it would read the difficulties of others."""
    assert settle(tmp_path, gamed_rows(by_model=False)) == pytest.approx(TRUE)


def test_column_with_instructions_goes_before_any_order(tmp_path):
    table = [{**row, "instruction": PROMPTS[row["index"]]} for row in gamed_rows()]
    random.Random(1).shuffle(table)
    columns = [*COLUMNS, "instruction"]
    assert settle(tmp_path, table, columns, asked=PROMPTS[::-1]) == pytest.approx(TRUE)
    assert settle(tmp_path, table, columns, instructions=PROMPTS[2:4]) == pytest.approx({p: TRUE[p] for p in PROMPTS[2:4]})
    with pytest.raises(UserError, match="has no row for 1 instructions of the reference, first 'another'"):
        settle(tmp_path, table, columns, instructions=[*PROMPTS, "another"])


def test_alpaca_evals_own_instructions_have_its_own_order(tmp_path, monkeypatch):
    import hashlib

    order = {hashlib.sha256(text.encode()).hexdigest()[:8]: place for place, text in enumerate(PROMPTS)}
    monkeypatch.setattr(difficulty, "OFFICIAL", order)
    assert settle(tmp_path, gamed_rows(), asked=PROMPTS[::-1], instructions=PROMPTS[::-1]) == pytest.approx(TRUE)
    assert settle(tmp_path, gamed_rows(), asked=PROMPTS[:2], instructions=PROMPTS[4:]) == pytest.approx(
        {p: TRUE[p] for p in PROMPTS[4:]}
    )


def test_alpaca_eval_has_805_instructions_each_with_a_place():
    assert sorted(difficulty.OFFICIAL.values()) == list(range(805))
    assert difficulty.official_place("How can I improve my time management skills?") == 725
    assert difficulty.official_place("question 1") is None


@pytest.mark.parametrize(
    ("table", "columns", "instructions", "fault"),
    [
        (gamed_rows(), COLUMNS, [*PROMPTS, PROMPTS[0]], "do not have the same instructions, once each"),
        (gamed_rows(), COLUMNS, PROMPTS[:5], "do not have the same instructions, once each"),
        (gamed_rows()[1:6], COLUMNS, PROMPTS, "must begin with the instructions 0 to 5"),
        ([{"index": n} for n in range(6)], ["index"], PROMPTS, "has no column model, instruction_difficulty, preference"),
        ([{"model": "m"}], ["model"], PROMPTS, "with a column `index`: it has no such column or no rows"),
        ([], COLUMNS, PROMPTS, "with a column `index`: it has no such column or no rows"),
    ],
)
def test_table_that_does_not_tell_whose_its_difficulties_are_is_refused(tmp_path, table, columns, instructions, fault):
    with pytest.raises(UserError, match=fault):
        settle(tmp_path, table, columns, instructions=instructions)
