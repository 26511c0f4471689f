"""Verifiers against a table of answers that were graded by hand, and gold answers that are refused before a run starts."""

import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from evolve_ray.config import options as config
from evolve_ray.data.prompts import read_prompts
from evolve_ray.errors import UserError
from evolve_ray.score import verifiers
from evolve_ray.score.held_text import visible
from evolve_ray.score.statements import final_answer
from evolve_ray.score.verifiers import build_verifier, gold_check, verifier_key

VERDICTS = {1.0: "right", 0.0: "wrong"}


def read_table():
    """(kind, verifier, gold answer, response, verdict) of every row of the table, once for each verifier that it names."""
    lines = (Path(__file__).parent / "graders.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        if not line.startswith("#"):
            kind, names, *texts, verdict = line.split("\t")
            gold, response = (text.replace("⏎", "\n") for text in texts)
            for name in [names] if names.startswith("regex:") else names.split():
                yield kind, name, gold, response, verdict


TABLE = list(read_table())


@cache
def verifier(name):
    """Built once: the child process of `math` takes seconds to start."""
    name, _, pattern = name.partition(":")
    return build_verifier(config.Verifier(name=name, pattern=pattern))


def verdict(name, gold, response):
    judge = verifier(name)
    return "refused" if judge.check_gold(gold) else VERDICTS.get(judge(["q"], [gold], [response])[0], "none")


@pytest.mark.parametrize("name", ["math", "numeric", "regex"])
def test_every_verdict_is_that_of_the_hand(name):
    rows = [row for row in TABLE if row[1].partition(":")[0] == name]
    assert [(row, given) for row in rows if (given := verdict(*row[1:4])) != row[4]] == []


def test_table_has_hundreds_of_rows_of_many_kinds_and_of_every_verdict():
    rows = {(gold, response) for _, _, gold, response, _ in TABLE}
    verdicts = Counter((name.partition(":")[0], verdict) for _, name, _, _, verdict in TABLE)
    assert len(rows) >= 1000
    assert len({kind for kind, *_ in TABLE}) >= 25
    assert all(verdicts[name, said] >= 5 for name in ("math", "numeric", "regex") for said in ("right", "wrong", "refused"))


CONTEXTS = (
    "{}", "The answer is {}.", "So she has {} left.", "Answer: {}", r"\boxed{{{}}}", r"$\boxed{{{}}}$", "**{}**", "#### {}",
    "x = {}",
    "First 3, then 8.\n\nThe answer is {}", "<think>maybe 99</think>\nIt is {}.", r"\[ {} \]",
    "The answer is 99. Wait, no: {}",
)  # fmt: skip
SEPARATORS = (", ", " or ", " and ", ", or ", "; ", " / ", " to ", " or maybe ", r"\text{ or }")


@pytest.mark.parametrize("name", ["math", "numeric"])
def test_number_is_right_in_every_context_and_beside_another_candidate_in_none(name):
    numbers = random.Random(0)
    for context in CONTEXTS:
        number = numbers.choice([7, -15, 1234, 100000])
        right = [number, f"{number:,}", f"{number}.0", rf"\frac{{{2 * number}}}{{2}}", f"{number}".replace("-", "\N{MINUS SIGN}")]
        wrong = [f"{one}{between}{other}" for between in SEPARATORS for one, other in ((number, 7001), (7001, number))]
        wrong += [f"between {number} and 7001", f"({number}, 7001)", f"at least {number}", f"{number} or more", number + 1]
        for given, texts in ("right", right), ("wrong", wrong):
            responses = [context.format(text) for text in texts]
            assert [response for response in responses if verdict(name, str(number), response) != given] == []


PIECES = (
    "5", " ", "or", r"\frac{1}{2}", "}", "{", "$", "x", "=", ",", ".", "\n", "answer is", "not", "-", "(", ")", r"\boxed{",
    r"\text{", "%", "^", "|", "half", "a million", "12:30", "½", "<think>", "</think>", "e5", "1e99999999", "/0", r"\pm", "≈",
    "[",
    "####", "\\\\",
)  # fmt: skip


def test_no_text_ends_in_an_error():
    pieces = random.Random(0)
    numeric = verifier("numeric")
    for _ in range(1500):
        text = "".join(pieces.choices(PIECES, k=pieces.randint(1, 14)))
        numeric.check_gold(text)
        assert numeric(["q", "q"], ["5", text], [text, "5"])[0] in VERDICTS


@pytest.mark.parametrize(
    "piece", ["-", "(", "$ ", r"\boxed{", r"\boxed{5}, ", r"\( ", "the answer is ", "no, ", "5 or ", "5\n", "<think>"]
)
def test_long_text_is_read_in_a_time_that_grows_with_its_length(piece):
    assert final_answer(piece * (40_000 // len(piece))) is not None


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("a<think>b</think>c", "a\nc"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<think>a", ""),
        ("a<think>b</think>c<think>d", ""),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
    ],
)
def test_thinking_is_not_visible(response, shown):
    assert visible(response) == shown


@pytest.fixture
def rows(tmp_path):
    """A prompt file with these gold answers."""

    def write(*answers):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f'{{"q": "{number}", "a": "{answer}"}}\n' for number, answer in enumerate(answers)))
        return str(path)

    return write


def test_all_ambiguous_gold_answers_of_a_file_are_refused_by_their_lines(rows):
    path = rows("4", "(1,2)", "3 or 4", "1/2", "10:30", "-1,000.5")
    check = gold_check(config.Verifier(name="numeric"))
    with pytest.raises(UserError) as fault:
        read_prompts(path, prompt_column="q", answer_column="a", gold_fault=check)
    said = str(fault.value)
    assert (
        f"{path}: 3 unusable rows: {path}:2: gold answer '(1,2)' is not one number, as verifier.name 'numeric' needs it; " in said
    )
    assert f"{path}:3: gold answer '3 or 4'" in said
    assert f"{path}:5: gold answer '10:30'" in said


def test_gold_answer_is_checked_as_answer_pattern_takes_it(rows):
    path = rows("3 + 4 = 7 #### 7", "4 + 4 = 8 #### 8 or 9")
    check = gold_check(config.Verifier(name="numeric"))
    with pytest.raises(UserError, match=r"1 unusable row: .*rows\.jsonl:2: gold answer '8 or 9' is not one number"):
        read_prompts(path, prompt_column="q", answer_column="a", answer_pattern=r"####\s*(.+)", gold_fault=check)


def test_long_gold_answer_is_shown_by_its_end():
    said = gold_check(config.Verifier(name="numeric"))("x" * 100 + "END")
    assert said.startswith("gold answer '...xxx")
    assert "END'" in said
    assert len(said) < 160


def test_regex_refuses_a_gold_answer_that_its_pattern_reads_otherwise():
    check = gold_check(config.Verifier(name="regex", pattern=r"(\d+)"))
    assert check("18") == ""
    assert "verifier.pattern takes '5' out of it" in check("-5")


class Careful:
    """A plug that checks gold answers."""

    def __call__(self, prompts, answers, responses):
        return [0.0] * len(responses)

    def check_gold(self, answer):
        return "" if answer == "yes" else "is not yes"


class Heavy:
    """A plug that checks nothing, and must not be built to find that out."""

    def __init__(self):
        raise AssertionError


def test_plug_may_check_gold_answers_and_need_not():
    assert gold_check(None) is None
    assert gold_check(config.Verifier(name="exact")) is None
    assert gold_check(config.Verifier(name=f"{__name__}:Heavy")) is None
    check = gold_check(config.Verifier(name=f"{__name__}:Careful"))
    assert (check("yes"), "is not yes" in check("no")) == ("", True)


def test_stage_keys_name_the_grading_where_it_changed_and_only_there():
    older = {"name": "exact", "pattern": "", "tolerance": 1e-9}
    assert verifier_key(None) is None
    assert verifier_key(config.Verifier(name="exact")) == older
    own = verifier_key(config.Verifier(name=f"{__name__}:Careful"))
    assert own is not None
    assert own.pop("plugs").keys() == {f"{__name__}:Careful"}, "the source of a verifier of one's own"
    assert own == {**older, "name": f"{__name__}:Careful"}
    for name in verifiers.GRADING:
        assert verifier_key(config.Verifier(name=name)) == {**older, "name": name, "grading": 2}
