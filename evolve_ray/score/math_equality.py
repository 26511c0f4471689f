"""Compares what `math_reading` has read: numbers exactly, expressions by math-verify, lists and brackets item by item."""

import re
from typing import Any

import sympy
from math_verify import verify
from sympy import Basic, MatrixBase, Rational
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from evolve_ray.score.math_reading import Answer, Formula, Group, Named, Node, Union, Words, read, read_leaf
from evolve_ray.score.quantities import factors

CHOICE = re.compile(r"\W*(?:(?:option|choice|answer)\s+)?\W*([A-J])(?=[).:,;\]}]|\s*$|\s+(?:because|since|as)\b)(.*)", re.DOTALL)
ANOTHER = re.compile(r"(?:\bor\b|\band\b|[,/&])\s*\(?[A-J]\b\)?(?!\s+\w)")
UNDEFINED = (sympy.zoo, sympy.nan)
ROUNDED = 6  # digits behind the point from which a decimal may stand for a number that is no decimal


def gold_fault(answer: str) -> str:
    """What is wrong with a gold answer; "" if nothing is."""
    gold = read(answer, strict=True)
    if not gold.node and not gold.choice:
        return "cannot be read as mathematics"
    if isinstance(gold.node, Formula) and isinstance(gold.node.expression, Basic) and gold.node.expression.has(*UNDEFINED):
        return "is not defined"
    numbers = isinstance(gold.node, Words) and re.search(r"\d", gold.node.text)
    return "is a time, a date or a version, not mathematics" if numbers else ""


def read_gold(answer: str) -> Answer | None:
    """What a gold answer states: all of it, or else the last value of its prose; None if it cannot be read."""
    for strict in (True, False):
        gold = read(answer, strict=strict)
        if gold.node or gold.choice:
            return gold
    return None


def equals(gold: Answer, text: str) -> bool:
    """Whether a response states what the gold answer states."""
    response = read(text)
    if gold.choice:
        chosen = CHOICE.match(response.words)
        if chosen and chosen[1] == gold.choice and not ANOTHER.search(chosen[2]):
            return True
    if isinstance(gold.node, Words):
        return plain(gold.node.text) in (plain(response.words), plain(re.split(r"[,;(]", response.words)[0]))
    return gold.node is not None and response.node is not None and same(gold.node, response.node)


def plain(text: str) -> str:
    """A text in lower case, without punctuation and articles."""
    text = re.sub(r"[^\w\s/:-]", "", text).strip().lower()
    return re.sub(r"\s+", " ", re.sub(r"^(?:it is|its|that is|the|an?|on)\s+", "", text))


def same(gold: Node, response: Node) -> bool:
    for node in (gold, response):
        if isinstance(node, Group) and node.brackets == "≈":
            return any(same(item, response) if node is gold else same(gold, item) for item in readings(node))
    if isinstance(gold, Named) or isinstance(response, Named):
        return same_named(gold, response)
    if isinstance(gold, Words) or isinstance(response, Words):
        return isinstance(gold, Words) and isinstance(response, Words) and plain(gold.text) == plain(response.text)
    if any(isinstance(node, Union) or is_relation(node) or is_set(node) for node in (gold, response)):
        return same_formula(gold, response) or same_sets(gold, response)
    return same_group(gold, response) if isinstance(gold, Group) or isinstance(response, Group) else same_formula(gold, response)


def readings(approximation: Group) -> tuple[Node, ...]:
    """`100/3 ≈ 33.33` may be read as either; if the number is not rounded from the other, only the last counts."""
    rounded, exact = approximation.items
    if isinstance(exact, Named):
        exact = exact.value
    if not (isinstance(rounded, Formula) and isinstance(exact, Formula) and is_number(rounded) and is_number(exact)):
        return (rounded,)
    near = abs(exact.expression - rounded.expression) <= Rational(1, 2 * 10**rounded.quantity.decimals)
    return (rounded, exact) if near else (rounded,)


def same_named(gold: Node, response: Node) -> bool:
    """The names must be the same where both are single variables; a value without a name is the value of any."""
    if isinstance(gold, Named) and isinstance(response, Named):
        if gold.name == response.name or not len(gold.name) == len(response.name) == 1:
            return same(gold.value, response.value)
    elif isinstance(gold, Named) and not is_equation(response):
        return same(gold.value, response)
    elif isinstance(response, Named) and not is_equation(gold):
        return same(gold, response.value)
    first, second = (read_leaf(node.equation) if isinstance(node, Named) else node for node in (gold, response))
    return first is not None and second is not None and same_formula(first, second)


def is_relation(node: Node) -> bool:
    """Whether a node is an inequality or an equation, or several in one, as in 1 < x < 2."""
    expression = node.expression if isinstance(node, Formula) else None
    parts = expression.args if isinstance(expression, sympy.And) else (expression,)
    return all(isinstance(part, Relational) for part in parts)


def is_set(node: Node) -> bool:
    return isinstance(node, Formula) and isinstance(node.expression, sympy.Set)


def is_equation(node: Node) -> bool:
    return isinstance(node, Formula) and isinstance(node.expression, sympy.Eq)


def is_number(node: Formula) -> bool:
    expression = node.expression
    return isinstance(expression, sympy.Expr) and not expression.free_symbols and expression.is_number is True


def same_group(gold: Node, response: Node) -> bool:
    """Lists and sets without their order, tuples and intervals with it; a list may stand for either."""
    if not isinstance(gold, Group) or not isinstance(response, Group):
        several, one = (gold, response) if isinstance(gold, Group) else (response, gold)
        if not isinstance(several, Group) or not isinstance(one, Formula):
            return False
        if isinstance(one.expression, MatrixBase) and 1 in one.expression.shape:
            return several.brackets != "{}" and same_items(several.items, tuple(map(Formula, one.expression)))
        alone = several.brackets in ("", "{}") and bool(several.items)
        return alone and all(same(one, item) if one is gold else same(item, one) for item in several.items)
    if gold.brackets in ("", "{}") and response.brackets in ("", "{}"):
        rest = distinct(response.items)
        for item in distinct(gold.items):
            equal_item = next((other for other in rest if same(item, other)), None)
            if equal_item is None:
                return False
            rest.remove(equal_item)
        return not rest
    if "{}" in (gold.brackets, response.brackets):
        return False
    alike = gold.brackets == response.brackets or "" in (gold.brackets, response.brackets)
    vectors = len(gold.items) > 2 and {gold.brackets, response.brackets} == {"()", "[]"}
    return (alike or vectors) and same_items(gold.items, response.items)


def distinct(items: tuple[Node, ...]) -> list[Node]:
    kept: list[Node] = []
    for item in items:
        if not any(same(other, item) for other in kept):
            kept.append(item)
    return kept


def same_items(gold: tuple[Node, ...], response: tuple[Node, ...]) -> bool:
    return len(gold) == len(response) and all(same(one, other) for one, other in zip(gold, response, strict=True))


def same_sets(gold: Node, response: Node) -> bool:
    """Unions, intervals and inequalities as sets of real numbers."""
    first, second = as_set(gold), as_set(response)
    if first is None or second is None:
        return False
    return bool(first == second or first.symmetric_difference(second).is_empty)


def as_set(node: Node) -> sympy.Set | None:
    """The set of real numbers that a node stands for; None if it stands for none."""
    if isinstance(node, Named):
        return as_set(node.value)
    if isinstance(node, Formula):
        if isinstance(node.expression, sympy.Set):
            return node.expression
        expression = node.expression.replace(lambda part: isinstance(part, AppliedUndef), lambda part: sympy.Symbol(str(part)))
        if not is_relation(node) or len(expression.free_symbols) != 1:
            return None
        relations = expression.args if isinstance(expression, sympy.And) else (expression,)
        return sympy.Intersection(*(relation.func(*relation.args).as_set() for relation in relations))
    if isinstance(node, Group) and node.brackets in ("()", "[]", "(]", "[)") and len(node.items) == 2:
        start, end = (item.expression if isinstance(item, Formula) else sympy.I for item in node.items)
        real = start.is_extended_real and end.is_extended_real
        return sympy.Interval(start, end, node.brackets[0] == "(", node.brackets[1] == ")") if real else None
    if isinstance(node, Group) and node.brackets == "{}":
        return sympy.FiniteSet(*(item.expression for item in node.items if isinstance(item, Formula)))
    if isinstance(node, Union) or (isinstance(node, Group) and node.brackets == ""):
        parts = [as_set(part) for part in (node.parts if isinstance(node, Union) else node.items)]
        return None if None in parts else sympy.Union(*parts)
    return None


def same_formula(gold: Node, response: Node) -> bool:
    if not isinstance(gold, Formula) or not isinstance(response, Formula) or is_equation(gold) != is_equation(response):
        return False
    first, second = gold.expression, response.expression
    if isinstance(first, MatrixBase) and isinstance(second, MatrixBase):
        return first.shape == second.shape and same_items(tuple(map(Formula, first)), tuple(map(Formula, second)))
    if not (is_number(gold) and is_number(response)):
        # math-verify takes for 0 what is smaller than its precision.
        return verify(first, second, numeric_precision=1000, timeout_seconds=None)
    return any(
        same_number(gold, response, first * Rational(*one.as_integer_ratio()), second * Rational(*other.as_integer_ratio()))
        for one, other in factors(gold.quantity, response.quantity, first)
    )


def same_number(gold: Formula, response: Formula, first: Any, second: Any) -> bool:
    """Equal; or one is a decimal of at least `ROUNDED` places to which the other, no finite decimal, is rounded."""
    first, second = first.doit(), second.doit()
    if first == second or (not (first.is_Rational and second.is_Rational) and is_close(first, second)):
        return True
    for written, decimal, other in ((gold.quantity, first, second), (response.quantity, second, first)):
        if written.decimals >= ROUNDED and decimal.is_Rational and other.is_extended_real and not is_decimal(other):
            return bool(abs(other - decimal) <= Rational(1, 2 * 10**written.decimals))
    return False


def is_decimal(number: Any) -> bool:
    """Whether a number has finitely many digits."""
    rest = number.q if number.is_Rational else 3
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def is_close(first: Any, second: Any) -> bool:
    """Whether two numbers agree on 50 digits, or are proved equal."""
    if not (first.is_finite and second.is_finite):
        return False
    one, other = sympy.N(first, 60), sympy.N(second, 60)
    difference, larger = abs(one - other), max(abs(one), abs(other))
    if difference <= larger * sympy.Float("1e-50", 60):
        return True
    return bool(difference < sympy.Float("1e-30", 60) and sympy.simplify(first - second) == 0)
