"""Verifiers: is the answer right? 1.0 means exactly right."""

import math
import re
from collections.abc import Callable

from evolve_ray.config import options as config
from evolve_ray.config.plugs import find_plug
from evolve_ray.errors import UserError
from evolve_ray.score.math_verifier import MathMatch
from evolve_ray.score.protocol import Scorer


class ExactMatch:
    """1.0 if the response equals the answer, surrounding white space apart, else 0.0."""

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [float(a is not None and r.strip() == a.strip()) for a, r in zip(answers, responses, strict=True)]


class RegexMatch:
    """1.0 if the last match of `pattern` in the response (its first group, if it has one) equals the answer, else 0.0."""

    def __init__(self, verifier: config.Verifier):
        if not verifier.pattern:
            raise UserError(r"verifier.pattern: must be set when verifier.name is 'regex', for example '####\s*(.+)'")
        try:
            self.pattern = re.compile(verifier.pattern)
        except re.error as error:
            raise UserError(f"verifier.pattern: {verifier.pattern!r} is not a regular expression: {error}") from None

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [float(a is not None and self._found(r) == a.strip()) for a, r in zip(answers, responses, strict=True)]

    def _found(self, response: str) -> str | None:
        found = None
        for match in self.pattern.finditer(response):
            found = match[1 if self.pattern.groups else 0]
        return None if found is None else found.strip()


# A sign is one only where it cannot be a minus between two terms; digits inside a word ("x2", "v1.2.3") are no number.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}%])[-+])?[$€£¥]?(?<![\w.])"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d+)?(?:/(?P<below>\d+))?"
)


class NumericMatch:
    """1.0 if the last number of the response is the last number of the answer, within the relative tolerance, else 0.0.

    Numbers are in English notation (`-1,234.5`, `1e-3`); `3/4` is a fraction; a percent sign or a unit is not read. NaN where
    the answer has no number: that is a fault of the data, not of the response.
    """

    def __init__(self, verifier: config.Verifier):
        self.tolerance = verifier.tolerance

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [self._judge(last_number(a or ""), last_number(r)) for a, r in zip(answers, responses, strict=True)]

    def _judge(self, truth: float, found: float) -> float:
        return float(math.isclose(truth, found, rel_tol=self.tolerance)) if math.isfinite(truth) else math.nan


def last_number(text: str) -> float:
    """NaN if there is none."""
    match = None
    for match in NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):  # noqa: B007 (the last one is what counts)
        pass
    if match is None:
        return math.nan
    sign, digits, exponent, below = match.group("sign", "digits", "exponent", "below")
    value = float((sign or "") + digits.replace(",", "") + (exponent or ""))
    if below is None:
        return value
    return value / float(below) if float(below) else math.nan


VERIFIERS: dict[str, Callable[[config.Verifier], Scorer]] = {
    "exact": lambda _: ExactMatch(),
    "regex": RegexMatch,
    "numeric": NumericMatch,
    "math": lambda _: MathMatch(),
}


def build_verifier(verifier: config.Verifier) -> Scorer:
    """A shipped verifier with its options; one of `module:Name` is made without arguments."""
    if verifier.name in VERIFIERS:
        return VERIFIERS[verifier.name](verifier)
    return find_plug({}, verifier.name, "verifier.name")()


def same_answer(options: config.Verifier | None) -> Callable[[str, str], bool]:
    """Whether two responses give the same answer as the verifier reads them; without a shipped one: the same text.

    Surrounding white space apart. Responses in which it reads no answer agree only if their texts do.
    """
    name = options.name if options else "exact"
    judge: Callable[[str, str], bool] = lambda one, other: False  # noqa: E731
    if options and name == "regex":
        found = RegexMatch(options)._found
        judge = lambda one, other: found(one) is not None and found(one) == found(other)  # noqa: E731
    if options and name == "numeric":
        judge = lambda one, other: math.isclose(last_number(one), last_number(other), rel_tol=options.tolerance)  # noqa: E731
    if name == "math":
        verifier = MathMatch()
        judge = lambda one, other: verifier._judge(one, other) == 1.0  # noqa: E731
    return lambda one, other: one.strip() == other.strip() or judge(one, other)
