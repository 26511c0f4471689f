"""Verifiers: compare a response with the gold answer; 1.0 means exactly right."""

import math
import re
from collections.abc import Callable

from evolve_ray.config import options
from evolve_ray.config.plugs import blame, find_plug, with_args
from evolve_ray.errors import UserError
from evolve_ray.score.math_verifier import MathMatch
from evolve_ray.score.programs import ProgramTests
from evolve_ray.score.protocol import Scorer


class ExactMatch:
    """1.0 if the response equals the gold answer, without surrounding white space; otherwise 0.0."""

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [float(a is not None and r.strip() == a.strip()) for a, r in zip(answers, responses, strict=True)]


class RegexMatch:
    """1.0 if the last match of `pattern` in the response (its first group, if any) equals the gold answer; otherwise 0.0."""

    def __init__(self, verifier: options.Verifier):
        if not verifier.pattern:
            raise UserError(r"verifier.pattern: must be set when verifier.name is 'regex', for example '####\s*(.+)'")
        try:
            self.pattern = re.compile(verifier.pattern)
        except re.error as error:
            raise UserError(f"verifier.pattern: {verifier.pattern!r} is not a regular expression: {error}") from None

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [float(a is not None and self.last_match(r) == a.strip()) for a, r in zip(answers, responses, strict=True)]

    def last_match(self, response: str) -> str | None:
        """The text of the last match, without surrounding white space; None if nothing matches."""
        text = None
        for match in self.pattern.finditer(response):
            text = match[1 if self.pattern.groups else 0]
        return None if text is None else text.strip()


# "-" or "+" is a sign only if it cannot stand between two terms; digits inside a word ("x2", "v1.2.3") are not a number.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}%])[-+])?[$€£¥]?(?<![\w.])"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d+)?(?:/(?P<denominator>\d+))?"
)


class NumericMatch:
    """1.0 if the last number of the response equals the last number of the gold answer, within a relative tolerance; else 0.0.

    Numbers are in English notation (`-1,234.5`, `1e-3`); `3/4` is a fraction; percent signs and units are ignored. NaN if the
    gold answer has no number: that is a fault of the data, not of the response.
    """

    def __init__(self, verifier: options.Verifier):
        self.tolerance = verifier.tolerance

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [self.compare(last_number(a or ""), last_number(r)) for a, r in zip(answers, responses, strict=True)]

    def compare(self, gold: float, number: float) -> float:
        return float(math.isclose(gold, number, rel_tol=self.tolerance)) if math.isfinite(gold) else math.nan


def last_number(text: str) -> float:
    """The last number in a text; NaN if there is none."""
    match = None
    for match in NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):  # noqa: B007 (the last one is what counts)
        pass
    if match is None:
        return math.nan
    sign, digits, exponent, denominator = match.group("sign", "digits", "exponent", "denominator")
    value = float((sign or "") + digits.replace(",", "") + (exponent or ""))
    if denominator is None:
        return value
    return value / float(denominator) if float(denominator) else math.nan


VERIFIERS: dict[str, Callable[..., Scorer]] = {
    "exact": lambda _: ExactMatch(),
    "regex": RegexMatch,
    "numeric": NumericMatch,
    "math": lambda _: MathMatch(),
    "tests": ProgramTests,
}


def build_verifier(verifier: options.Verifier) -> Scorer:
    """A shipped verifier with its options, or a plug `module:Name`, which gets its `args` if it takes them."""
    if verifier.name in VERIFIERS:
        return with_args("verifier.args", verifier.name, VERIFIERS[verifier.name], verifier.args)(verifier)
    plug = with_args("verifier.args", verifier.name, find_plug({}, verifier.name, "verifier.name"), verifier.args)
    with blame("verifier.name", verifier.name):
        return plug()


def same_answer(verifier: options.Verifier | None) -> Callable[[str, str], bool]:
    """A function that reports whether two responses give the same answer.

    Equal texts do, without surrounding white space. Other texts do if a shipped verifier reads the same answer in both; a text
    in which it reads no answer equals no other text.
    """
    name = verifier.name if verifier else "exact"
    agree: Callable[[str, str], bool] = lambda first, second: False  # noqa: E731
    if verifier and name == "regex":
        last_match = RegexMatch(verifier).last_match
        agree = lambda first, second: last_match(first) is not None and last_match(first) == last_match(second)  # noqa: E731
    if verifier and name == "numeric":
        agree = lambda first, second: math.isclose(  # noqa: E731
            last_number(first), last_number(second), rel_tol=verifier.tolerance
        )
    if name == "math":
        math_match = MathMatch()
        agree = lambda first, second: math_match.compare(first, second) == 1.0  # noqa: E731
    return lambda first, second: first.strip() == second.strip() or agree(first, second)
