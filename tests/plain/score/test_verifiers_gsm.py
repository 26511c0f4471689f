"""GSM8K and MATH rows: the gold answer out of the solution, and verdicts against those that were given by hand."""

import json
from pathlib import Path

import pytest

from evolve_ray.config import options as config
from evolve_ray.data.prompts import read_prompts
from evolve_ray.errors import UserError
from evolve_ray.score.verifiers import build_verifier

CASES = [json.loads(line) for line in (Path(__file__).parent / "gsm_cases.jsonl").read_text(encoding="utf-8").splitlines()]
HASHES = r"####\s*(.+)"
BOXED = r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # braces in it may be two deep

# Where a verifier does not agree with the hand, and why: always a right answer that it does not recognise.
MISSED = {
    47: "a sign in words",
    55: "the last number is another one",
}


@pytest.fixture
def read(tmp_path):
    """Prompt rows out of a JSONL file of `records`."""

    def read(*records, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return read_prompts(str(path), **options)[0]

    return read


@pytest.fixture(scope="module")
def verifiers():
    """Built once: the child process of `math` takes seconds to start."""
    return {name: build_verifier(config.Verifier(name=name)) for name in ("numeric", "math")}


def test_there_are_fifty_cases_of_many_kinds_and_of_both_verdicts():
    assert len(CASES) >= 50
    assert len({case["kind"] for case in CASES}) >= 15
    assert sum(case["expected"] for case in CASES) >= 30
    assert sum(not case["expected"] for case in CASES) >= 12
    assert [case["id"] for case in CASES] == list(range(1, len(CASES) + 1))


@pytest.mark.parametrize("name", ["numeric", "math"])
def test_verdicts_agree_with_the_hand_but_for_what_is_listed(read, verifiers, name):
    records = [{"id": str(case["id"]), "question": case["question"], "answer": case["answer"]} for case in CASES]
    table = read(*records, prompt_column="question", answer_column="answer", answer_pattern=HASHES, id_column="id")
    asked = ([row["prompt"] for row in table], [row["answer"] for row in table], [case["response"] for case in CASES])
    verdicts = verifiers[name](*asked)
    wrong = {case["id"]: value for case, value in zip(CASES, verdicts, strict=True) if value != case["expected"]}
    assert wrong == dict.fromkeys(MISSED, 0.0)


def test_gold_answer_is_the_first_group_of_the_last_match(read):
    solution = "A form is #### 7\nShe has 3+4=<<3+4=7>>7.\n#### 1,234 "
    (row,) = read({"question": "q", "answer": solution}, prompt_column="question", answer_column="answer", answer_pattern=HASHES)
    assert row["answer"] == "1,234"


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        (r"So $x = \boxed{12}$.", "12"),
        (r"Either \boxed{3} or, rather, $\boxed{\frac{1}{2}}$, as $2^{x}$ shows.", r"\frac{1}{2}"),
        (r"$\boxed{\dfrac{\sqrt{3}}{2}}$", r"\dfrac{\sqrt{3}}{2}"),
    ],
)
def test_boxed_answer_of_a_math_row_is_found_and_graded(read, verifiers, solution, gold):
    (row,) = read({"problem": "p", "solution": solution}, prompt_column="problem", answer_column="solution", answer_pattern=BOXED)
    assert row["answer"] == gold
    assert verifiers["math"](["p"] * 2, [row["answer"]] * 2, [f"It is \\boxed{{{gold}}}.", r"It is $\boxed{71}$."]) == [1.0, 0.0]


def test_row_without_the_pattern_is_refused_by_file_line_column_and_pattern(read):
    good, bad, blank = "x\n#### 3", "three, as was to be shown", "x\n####  "
    with pytest.raises(UserError) as fault:
        read(*({"q": str(n), "a": text} for n, text in enumerate((good, bad, blank))), prompt_column="q", answer_column="a",
             answer_pattern=HASHES)  # fmt: skip
    assert "2 unusable rows" in str(fault.value)
    assert "rows.jsonl:2: column 'a' has no match of answer_pattern" in str(fault.value)
    assert "'three, as was to be shown'" in str(fault.value)
    assert "rows.jsonl:3: " in str(fault.value)


def test_draft_column_comes_with_the_row_and_a_missing_one_is_named(read):
    (row,) = read({"prompt": "p", "draft": "d"}, prompt_column="prompt", draft_column="draft")
    assert row["draft"] == "d"
    with pytest.raises(UserError, match="has no column 'draft'"):
        read({"prompt": "p"}, prompt_column="prompt", draft_column="draft")


def test_math_reads_thousands_and_money_as_they_are_written_in_latex(verifiers):
    responses = [r"$200{,}000 - 130{,}000 = 70{,}000$", r"It is \$70,000.00", r"It is \$7,000.00", r"$70{,}00$"]
    assert verifiers["math"](["q"] * 4, ["70,000"] * 4, responses) == [1.0, 1.0, 0.0, 0.0]
