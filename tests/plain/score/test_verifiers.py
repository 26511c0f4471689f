"""Verifiers on tables of cases, several scorers in one, and what a recipe's scorer is built from. No model is loaded here."""

import json
import math
import sys
import threading

import pytest

from evolve_ray.config import options as config
from evolve_ray.errors import IntegrityError, ResourceError, UserError
from evolve_ray.score import combined as combinations
from evolve_ray.score import math_verifier
from evolve_ray.score.combined import build_scorer, reward_model_names
from evolve_ray.score.math_verifier import MathMatch
from evolve_ray.score.verifiers import VERIFIERS, ExactMatch, build_verifier
from evolve_ray.toy.task import SortVerifier
from tests.plain.processes import run_python
from tests.plain.test_house import HEAVY

NAN = math.nan


def verdict(answer, response, **options):
    (value,) = build_verifier(config.Verifier(**options))(["q"], [answer], [response])
    return value


def test_import_of_the_scorers_loads_nothing_heavy():
    loaded = run_python("import sys, json, evolve_ray.score.combined; print(json.dumps(sorted(sys.modules)))")
    assert [name for name in json.loads(loaded) if name in (*HEAVY, "sympy", "math_verify")] == []


def test_verifier_is_found_by_short_name_and_by_module():
    assert isinstance(build_verifier(config.Verifier()), ExactMatch)
    assert isinstance(build_verifier(config.Verifier(name="evolve_ray.toy.task:SortVerifier")), SortVerifier)
    with pytest.raises(UserError, match=r"verifier\.name"):
        build_verifier(config.Verifier(name="none:Such"))


def test_every_shipped_verifier_can_be_built_and_is_tested():
    names = config.Verifier.__dataclass_fields__["name"].metadata["choices"]
    assert set(names) == set(VERIFIERS) == {"exact", "regex", "numeric", "math", "tests"}


def test_exact_match_ignores_only_surrounding_space():
    verdicts = ExactMatch()(["q"] * 5, ["a b", "a b", "a b", "a b", None], ["a b", " a b\n", "ab", "A b", "a b"])
    assert verdicts == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("pattern", "answer", "response", "expected"),
    [
        (r"#### (.+)", "18", "so\n#### 18", 1.0),
        (r"#### (.+)", " 18\n", "#### 17\n#### 18 ", 1.0),  # the last match, stripped as the answer is
        (r"#### (.+)", "17", "#### 17\n#### 18", 0.0),
        (r"#### (.+)", "18", "18", 0.0),
        (r"\d+", "18", "first 17, then 18.", 1.0),  # no group: the whole match
        (r"(\d+)( apples)?", "18", "18 apples", 1.0),  # the first of two groups
        (r"yes|(no)", "yes", "yes", 0.0),  # its group took no part in the match
        (r"(.*)", "", "", 1.0),
        (r"(\d+)", None, "18", 0.0),
    ],
)
def test_regex_compares_its_last_match(pattern, answer, response, expected):
    assert verdict(answer, response, name="regex", pattern=pattern) == expected


@pytest.mark.parametrize(("pattern", "told"), [("", "must be set"), ("(", r"'\(' is not a regular expression: missing \)")])
def test_pattern_that_is_none_is_refused_when_the_verifier_is_built(pattern, told):
    with pytest.raises(UserError, match=rf"verifier\.pattern: {told}"):
        build_verifier(config.Verifier(name="regex", pattern=pattern))


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("5", "it is 5.", 1.0),
        ("5", "5, or rather 6", 0.0),
        ("6", "5, or rather 6", 1.0),
        ("-5", "x=-5", 1.0),
        ("-5", "\\boxed{-5}", 1.0),
        ("-5", "(3, -5)", 0.0),  # two numbers
        ("-5", "\N{MINUS SIGN}5", 1.0),
        ("-5", "-$5", 1.0),
        ("5", "8-5", 0.0),  # a calculation is no number
        ("3", "8-5", 0.0),
        ("-5", "8-5", 0.0),
        ("5", "f(x)-5", 0.0),
        ("5", "from 3 - 5", 0.0),
        ("1234567.5", "about 1,234,567.50 dollars", 1.0),
        ("1,234", "1234", 1.0),
        ("2345", "1,2345", 0.0),  # no thousands
        ("$1,000", "so $1000.", 1.0),
        ("1e5", "100,000", 1.0),
        ("0.0015", "1.5E-3 m", 1.0),
        (".5", "0.5", 1.0),
        ("1/2", "0.5", 1.0),
        ("1/2", "3/2", 0.0),
        ("-0.75", "-3/4", 1.0),
        ("50", "50%", 1.0),
        ("0.5", "50%", 1.0),
        ("0.5", "0.5%", 0.0),
        ("100", "100m2", 1.0),
        ("100", "100 m of x_2 in v2", 1.0),  # digits inside a word
        ("18", "He sells 9 eggs for $2 each.\n#### 18", 1.0),
        ("The sum is 9 + 9.\n#### 18", "18", 1.0),  # an answer is read as a response is
        ("(1,2)", "2", NAN),
        ("3", "none", 0.0),
        ("3", "", 0.0),
        ("3", "3/0", 0.0),
        ("3", "1e999", 0.0),
        ("0", "0.0000001", 0.0),
        ("0", "-0.0", 1.0),
        ("none", "3", NAN),
        ("none", "none", NAN),
        ("1e999", "1e999", 1.0),
        ("1e9999999", "1e9999999", NAN),
        (None, "3", NAN),
    ],
)
def test_numeric_compares_the_stated_numbers(answer, response, expected):
    assert verdict(answer, response, name="numeric") == pytest.approx(expected, nan_ok=True)


def test_tolerance_of_numeric_is_relative():
    def close(response, tolerance):
        return verdict("1000", response, name="numeric", tolerance=tolerance)

    assert (close("1009", 0.01), close("1011", 0.01), close("991", 0.01)) == (1.0, 0.0, 1.0)
    assert (close("1000.0", 0.0), close("1000.0001", 0.0)) == (1.0, 0.0)
    # The default is for digits behind the point: whole numbers must be equal, however large.
    assert verdict("10000000000", "10000000001", name="numeric") == 0.0
    assert verdict("10000000000", "10000000001", name="numeric", tolerance=2e-9) == 1.0
    assert verdict("0.3", "0.30000000000000004", name="numeric") == 1.0


@pytest.fixture(scope="module")
def math_match():
    return build_verifier(config.Verifier(name="math"))


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("1/2", "0.5", 1.0),
        ("\\frac{1}{2}", "The answer is $\\frac{2}{4}$.", 1.0),
        ("$\\frac{1}{2}$", "so we get \\boxed{\\frac12}", 1.0),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}", 0.0),
        ("x^2+2x+1", "$(x+1)^2$", 1.0),
        ("x^2+2x+1", "$(x+2)^2$", 0.0),
        ("\\sqrt{8}", "$2\\sqrt{2}$", 1.0),
        ("\\{1,2,3\\}", "$\\{3,2,1\\}$", 1.0),
        ("\\{1,2,3\\}", "$\\{1,2\\}$", 0.0),
        ("[0,1)", "It is $[0,1)$.", 1.0),
        ("[0,1)", "It is $[0,1]$.", 0.0),
        ("(-\\infty, 3] \\cup [5,\\infty)", "$(-\\infty,3]\\cup[5,\\infty)$", 1.0),
        ("50\\%", "0.5", 1.0),
        ("1,234", "$1234$", 1.0),
        ("x=5", "5", 1.0),
        ("-3", "\N{MINUS SIGN}3", 1.0),
        # Mathematics without dollar signs is read whole: neither is 2.
        ("2\\pi", "2", 0.0),
        ("2", "2\\pi", 0.0),
        ("2\\pi\\text{ cm}", "$2\\pi$", 1.0),
        ("2xy", "$2yx$", 1.0),
        ("1 and 2", "$\\{1,2\\}$", 1.0),
        # A text is not: its final expression counts.
        ("She has 3 and buys 4.\n#### 7", "So she has 7", 1.0),
        ("5", "\\boxed{5}, no, \\boxed{6}", 0.0),
        ("\\text{Monday}", " \\text{Monday}\n", 1.0),
        ("5", "I do not know", 0.0),
        ("5", "", 0.0),
        ("5", "\\frac{1}{", 0.0),
        ("", "5", NAN),
        ("?!", "?!", NAN),
        ("\\frac{1}{", "5", NAN),
        (None, "5", NAN),
    ],
)
def test_math_compares_what_is_meant(math_match, answer, response, expected):
    assert math_match(["q"], [answer], [response]) == pytest.approx([expected], nan_ok=True)


def test_math_judges_outside_the_main_thread(math_match):
    found = []
    thread = threading.Thread(target=lambda: found.extend(math_match(["q"] * 2, ["1/2"] * 2, ["0.5", "0.6"])))
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]


@pytest.mark.slow
def test_math_that_never_ends_is_ended_and_costs_its_own_verdict_alone(monkeypatch):
    monkeypatch.setattr(MathMatch, "CPU_SECONDS", 1.0)
    endless = "x^{" * 60 + "2" + "}" * 60  # an answer that cannot be read in time is one that cannot be read
    judge = MathMatch()
    values = judge(["q"] * 3, ["2", "2", endless], ["$2^{2^{100}}$", "$1+1$", "1"])
    assert values == pytest.approx([0.0, 1.0, NAN], nan_ok=True)
    assert judge.check_gold(endless) == "cannot be read as mathematics in 1 s"
    assert judge.check_gold("2") == ""


def test_answer_that_cannot_be_handled_costs_its_own_verdict_alone(math_match):
    deep = "(" * 900 + "1" + ")" * 900  # a RecursionError
    responses = [deep, rf"\boxed{{{deep}}}", r"x \in \frac{0}{0} \cup [1, i)", "9" * 50_000, "2"]
    assert math_match(["q"] * 5, ["2"] * 5, responses) == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert math_match.check_gold(deep) == "cannot be read as mathematics"


def test_process_that_judges_ends_with_its_owner():
    judge = MathMatch()
    assert judge(["q"], ["2"], ["2"]) == [1.0]
    judge._child.stdin.close()
    assert judge._child.wait(timeout=30) == 0


def test_process_that_cannot_judge_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ResourceError, match="verifier 'math': its process ended with exit code 1"):
        MathMatch()(["q"], ["2"], ["2"])


def test_math_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(math_verifier.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"verifier\.name: 'math' needs .* install -e '\.\[eval\]'"):
        build_verifier(config.Verifier(name="math"))


class Length:
    """The number of letters of a response."""

    def __call__(self, prompts, answers, responses):
        return [len(response) for response in responses]


class Short(Length):
    """One value too few."""

    def __call__(self, *batch):
        return super().__call__(*batch)[1:]


class Odd(Length):
    """No finite number for some."""

    def __call__(self, prompts, answers, responses):
        return [{"a": NAN, "b": math.inf, "c": None}.get(response, 1.0) for response in responses]


def combined(name, *members, responses, verifier=None):
    scorer = build_scorer(config.Scorer(name=name, members=list(members)), {}, verifier)
    return scorer(["q"] * len(responses), ["abc"] * len(responses), responses)


LENGTH, SHORT, ODD = (f"{__name__}:{kind.__name__}" for kind in (Length, Short, Odd))


@pytest.mark.parametrize(("name", "expected"), [("mean", [2.0, 0.5, 1.0]), ("minimum", [1.0, 0.0, 0.0])])
def test_mean_and_minimum_go_by_response(name, expected):
    assert combined(name, LENGTH, "verifier", responses=["abc", "x", "xy"], verifier=ExactMatch()) == expected


@pytest.mark.parametrize("name", ["mean", "minimum"])
def test_response_that_one_member_cannot_score_gets_no_number(name):
    values = combined(name, LENGTH, ODD, responses=["a", "b", "c", "d"])
    assert [math.isnan(value) for value in values] == [True, True, True, False]
    assert values[3] == 1.0


def test_member_with_a_wrong_number_of_values_is_named():
    with pytest.raises(IntegrityError, match=f"scorer member {SHORT}: returned 1 values for 2 responses"):
        combined("mean", LENGTH, SHORT, responses=["a", "b"])


def test_no_responses_have_no_scores():
    assert combined("minimum", LENGTH, ODD, responses=[]) == []


def test_scorer_that_stands_there_twice_is_refused():
    with pytest.raises(UserError, match=rf"scorer\.members: '{LENGTH}' occurs 2 times"):
        combined("mean", LENGTH, "verifier", LENGTH, responses=[], verifier=ExactMatch())


def test_verifier_as_scorer_is_the_recipes_own():
    verifier = ExactMatch()
    assert build_scorer(config.Scorer(name="verifier"), {}, verifier) is verifier
    assert build_scorer(config.Scorer(name="mean", members=["verifier"]), {}, verifier).members == {"verifier": verifier}
    for scorer in (config.Scorer(name="verifier"), config.Scorer(name="mean", members=["verifier"])):
        with pytest.raises(UserError, match=r"add a \[verifier\] table"):
            build_scorer(scorer, {}, None)


def test_plugged_scorer_is_found_and_a_missing_one_is_named_by_its_field():
    assert isinstance(build_scorer(config.Scorer(name=LENGTH), {}, None), Length)
    with pytest.raises(UserError, match=r"scorer\.name: 'none:Such'"):
        build_scorer(config.Scorer(name="none:Such"), {}, None)
    with pytest.raises(UserError, match=r"scorer\.members: 'none:Such'"):
        build_scorer(config.Scorer(name="mean", members=["none:Such"]), {}, None)


def test_reward_models_are_hosted_by_the_names_of_the_recipe(monkeypatch):
    monkeypatch.setattr(combinations, "RewardModel", lambda options, folder, field="scorer.model", day="": (folder, field))
    one = config.Scorer(model="some/model")
    several = config.Scorer(name="mean", members=["reward_model=toy:reward_model", "verifier", "reward_model=other"])
    folders = {"some/model": "/one", "toy:reward_model": "/two", "other": "/three"}
    assert reward_model_names(one) == ["some/model"]
    assert reward_model_names(several) == ["toy:reward_model", "other"]
    assert reward_model_names(config.Scorer(name="verifier", model="unused")) == []
    assert build_scorer(one, folders, None) == ("/one", "scorer.model")
    members = build_scorer(several, folders, ExactMatch()).members
    assert [members[several.members[place]] for place in (0, 2)] == [("/two", "scorer.members"), ("/three", "scorer.members")]
