"""Verifiers: compare a response with the gold answer; 1.0 means exactly right."""

import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from evolve_ray.config import options
from evolve_ray.config.plugs import find_plug
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError
from evolve_ray.score.held_text import visible
from evolve_ray.score.math_verifier import MathMatch
from evolve_ray.score.protocol import Scorer
from evolve_ray.score.quantities import CONTEXT, Quantity, factors, read_readings, said_twice, without_latex
from evolve_ray.score.statements import final_answer


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
        shown = map(visible, responses)
        return [float(a is not None and self.last_match(r) == a.strip()) for a, r in zip(answers, shown, strict=True)]

    def check_gold(self, answer: str) -> str:
        """What is wrong with a gold answer; "" if nothing is. A gold answer that the pattern reads otherwise is never matched."""
        taken = self.last_match(answer)
        if taken is None or taken == answer.strip():
            return ""
        return f"cannot be matched: verifier.pattern takes {taken!r} out of it"

    def last_match(self, response: str) -> str | None:
        """The text of the last match, without surrounding white space; None if nothing matches."""
        text = None
        for match in self.pattern.finditer(response):
            text = match[1 if self.pattern.groups else 0]
        return None if text is None else text.strip()


class NumericMatch:
    """1.0 if the response states the number of the gold answer, within a relative tolerance; else 0.0.

    NaN if the gold answer is not one number: that is a fault of the data, not of the response.
    """

    def __init__(self, verifier: options.Verifier):
        self.tolerance = verifier.tolerance

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [self.compare(a or "", r) for a, r in zip(answers, responses, strict=True)]

    def compare(self, answer: str, response: str) -> float:
        gold = stated_numbers(answer)
        return float(any(self.same(a, r) for a in gold for r in stated_numbers(response))) if gold else math.nan

    def same(self, gold: Quantity, number: Quantity) -> bool:
        ways = factors(gold, number, gold.value)
        return any(self.close(scaled(gold.value, one), scaled(number.value, other)) for one, other in ways)

    def close(self, gold: Decimal, number: Decimal) -> bool:
        """Whether two numbers are equal; the default tolerance is for digits behind the point, whole numbers must be equal."""
        whole = gold == gold.to_integral_value() and number == number.to_integral_value()
        if gold == number or (whole and self.tolerance <= TOLERANCE):
            return gold == number
        largest = max(gold.copy_abs(), number.copy_abs())
        return CONTEXT.subtract(gold, number).copy_abs() <= CONTEXT.multiply(largest, Decimal(self.tolerance))

    def check_gold(self, answer: str) -> str:
        """What is wrong with a gold answer; "" if nothing is."""
        stated = final_answer(answer)
        return "" if read_numbers((stated.marked and stated.value) or stated.words) else "is not one number"


TOLERANCE = options.Verifier().tolerance


def scaled(number: Decimal, factor: Fraction) -> Decimal:
    if factor == 1:
        return number
    return CONTEXT.divide(CONTEXT.multiply(number, Decimal(factor.numerator)), Decimal(factor.denominator))


def stated_numbers(text: str) -> list[Quantity]:
    """The readings of the number that a text states as its answer; none if it states no number, or several."""
    stated = final_answer(text)
    return read_numbers(stated.value) if stated.value else []


def read_numbers(text: str) -> list[Quantity]:
    """The readings of one number, also of what says it twice: "18, 18.00", "1/2 (0.5)"."""
    text = without_latex(text)
    twice = said_twice(text)
    return [twice] if twice else read_readings(text)


VERIFIERS: dict[str, Callable[[options.Verifier], Scorer]] = {
    "exact": lambda _: ExactMatch(),
    "regex": RegexMatch,
    "numeric": NumericMatch,
    "math": lambda _: MathMatch(),
}


GRADING = {"regex": 2, "numeric": 2, "math": 2}  # raised where a verifier gives other verdicts than before


def verifier_key(verifier: options.Verifier | None) -> dict[str, Any] | None:
    """The part of a stage key that decides the verdicts of a recipe's verifier."""
    if verifier is None:
        return None
    grading = {"grading": GRADING[verifier.name]} if verifier.name in GRADING else {}
    return {**resolved(verifier, runtime=False), **grading}


def gold_check(verifier: options.Verifier | None) -> Callable[[str], str] | None:
    """A function that returns what is wrong with a gold answer, "" if nothing is; None if the verifier has no `check_gold`."""
    if verifier is None:
        return None
    shipped = verifier.name in VERIFIERS
    if not shipped and not hasattr(find_plug({}, verifier.name, "verifier.name"), "check_gold"):
        return None  # it is not built here: that may load a model
    check = getattr(build_verifier(verifier), "check_gold", None)
    if check is None:
        return None

    def fault(answer: str) -> str:
        what = check(answer)
        shown = answer if len(answer) <= 60 else f"...{answer[-60:]}"
        return f"gold answer {shown!r} {what}, as verifier.name {verifier.name!r} needs it" if what else ""

    return fault


def build_verifier(verifier: options.Verifier) -> Scorer:
    """A shipped verifier with its options, or a plug `module:Name`, which is built without arguments."""
    if verifier.name in VERIFIERS:
        return VERIFIERS[verifier.name](verifier)
    return find_plug({}, verifier.name, "verifier.name")()


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
        numeric = NumericMatch(verifier)
        agree = lambda first, second: numeric.compare(first, second) == 1.0  # noqa: E731
    if name == "math":
        math_match = MathMatch()
        agree = lambda first, second: math_match.compare(first, second) == 1.0  # noqa: E731
    return lambda first, second: first.strip() == second.strip() or agree(first, second)
