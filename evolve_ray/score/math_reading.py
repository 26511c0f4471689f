"""Reads mathematical answers for the verifier `math`: text -> lists, tuples, intervals, named values, expressions of SymPy.

Brackets and lists are taken apart here, so that every number in them is compared exactly; math-verify reads the expressions.
"""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify import LatexExtractionConfig, parse
from sympy import Basic, Float, MatrixBase, Rational

from evolve_ray.score.held_text import COMMAND, has_prose, split_top
from evolve_ray.score.quantities import DAYS, LATEX_GROUPS, Quantity, read_quantity, read_unit, said_twice, without_latex
from evolve_ray.score.statements import final_answer

NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
EXTRACTION = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=NORMALIZATION)]


@dataclass(frozen=True)
class Formula:
    """An expression of SymPy in which every decimal is a fraction; `quantity` has its percent sign, unit and digits."""

    expression: Any
    quantity: Quantity = field(default_factory=lambda: Quantity(Decimal(1)))


@dataclass(frozen=True)
class Named:
    """`x = 5`: the value of a variable, a function or a word; `equation` is the whole as text."""

    name: str
    value: "Node"
    equation: str


@dataclass(frozen=True)
class Group:
    """Several values, or a set of one or none.

    `brackets` are "()", "[]", "(]", "[)" of a tuple or an interval, "{}" of a set, "" of a list, "::" of a ratio, and "≈" of an
    exact value and what it is rounded to.
    """

    brackets: str
    items: tuple["Node", ...]


@dataclass(frozen=True)
class Union:
    """A union of intervals and sets."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Words:
    """An answer that is text: Monday, no solution, 10:30."""

    text: str


Node = Formula | Named | Group | Union | Words


@dataclass(frozen=True)
class Answer:
    """What a text states: its mathematics, None if it cannot be read, its words, and the letter if it is a choice like (B)."""

    node: Node | None
    words: str
    choice: str = ""


SYMBOLS = {
    "π": r"\pi ", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ",
    "±": r"\pm ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "θ": r"\theta ",
    "≈": r"\approx ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u2115": r"\mathbb{N}",
    "<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "**": "^", r"\langle": "(", r"\rangle": ")", r"\varnothing": r"\emptyset ",
    r"\lor": " or ", r"\vee": " or ", r"\land": " and ", r"\wedge": " and ",
}  # fmt: skip
TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
REWRITTEN: tuple[tuple[re.Pattern, Any], ...] = (
    (re.compile("|".join(re.escape(symbol) + r"(?![A-Za-z])" * (symbol[-1].isalpha()) for symbol in SYMBOLS)),
     lambda match: SYMBOLS[match[0]]),
    (re.compile(r"√\s*(\d+|[A-Za-z]|\([^()]*\))"), r"\\sqrt{\1}"),
    (re.compile(r"(?:\\text\s*\{\s*)?\ball real(?: number|s\b)s?(?:\s*\})?", re.IGNORECASE), r"\\mathbb{R}"),
    (LATEX_GROUPS, ","),
    (re.compile(r"\\(?:mathrm|text)\s*\{([ei])\}"), r"\1"),
    (re.compile(r"\\(?:left|right|displaystyle|[Bb]ig[lr]?|bigg[lr]?|limits|qquad|quad)(?![A-Za-z])"), " "),
    (re.compile(r"(?<!\\)\\(?:[,;:!>]|(?=\s))|~|\n"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{\s*(or|and)\s*\}"), r" \1 "),
    (re.compile(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d+)\}"), lambda match: repeating(*match.groups())),
    (re.compile(r"(?<![A-Za-z\\\d.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d+)(?![\d.A-Za-z])"), r"\1\\cdot 10^{\2}"),
    (re.compile(r"(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])", re.IGNORECASE), r"\\infty "),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
)  # fmt: skip
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,]|\.\d*,)")
CLOCK_OR_DATE = re.compile(
    r"\d{1,2}:[0-5]\d(?::\d\d)?(?:\s*[ap]\.?m\.?)?|\d{4}-\d\d?-\d\d?|\d\d?/\d\d?/\d{2,4}|\d+(?:\.\d+){2,}", re.IGNORECASE
)
CLOCK_WORD = re.compile(rf"\d\s*(?:[ap]\.?m\b|o'clock)|\b(?:{'|'.join(DAYS)})\b", re.IGNORECASE)
NAME = re.compile(
    r"(?:\\(?:text|mathrm|mbox)\{[^{}]*\}|\\frac\{[A-Z]+\}\{[A-Z]+\}|\\(?:angle|triangle|overline|[a-zD]?elta|alpha|beta|theta|phi"
    r"|lambda|mu|sigma)\b|[A-Za-z|:]|\s|_(?:\w|\{[^{}]*\})|'|\((?:[^()+*/^-]|(?<=\()-)*\))+"
)
WORD_ANSWER = re.compile(r"[(\[]?[A-Za-z][A-Za-z'’ .,/-]*[)\]]?")
SHORT_WORDS = {"yes", "no", "odd", "nan", "all", "any", "dne"}
MAX_WORDS = 8  # of an answer that is text
LABEL = re.compile(r"\(?[A-J]\)?[).:]\s+(?=\S)")  # "(B) 12"
UNIT_BEHIND = re.compile(
    r"(?<=[\w}) ])\s*(?:\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?"
    r"|(?<=\s)[A-Za-z]{2,}(?:\s+[A-Za-z]{2,}){0,2}(?:\^\{?\d\}?)?)\s*$"
)
SEVERAL_NUMBERS = re.compile(r"(?<![\d._^])\d[\d.]*\s+\d")
BASED = re.compile(r"([0-9A-F]+)_\{?(\d+)\}?")


def repeating(whole: str, start: str, repeat: str) -> str:
    """0.1\\overline{6} as a fraction."""
    nines = 10 ** len(repeat) - 1
    top = int((whole or "0") + start) * nines + int(repeat)
    return rf"\frac{{{top}}}{{{nines * 10 ** len(start)}}}"


def read(text: str, *, strict: bool = False) -> Answer:
    """What a text states; `strict` takes the whole text of a gold answer that marks no answer, and no value in its prose."""
    stated = final_answer(text)
    words = TEXT.sub(r"\1", stated.words).strip(" .$\n")
    value = LABEL.sub("", stated.value, count=1) if LABEL.match(stated.value) else stated.value
    if not stated.marked and len(stated.words) > len(stated.value) and (strict or not value):
        few = len(words.split()) <= MAX_WORDS
        value = stated.words if few and (strict or not re.search(r"\d", words)) else ""
    elif not value and len(words.split()) <= MAX_WORDS:
        value = stated.words
    choice = re.fullmatch(r"\(?([A-J])\)?[.:)]?", words)
    return Answer(read_node(value) if value else None, words, choice[1] if choice else "")


def read_node(text: str) -> Node | None:
    """The mathematics of a text without delimiters; None if it cannot be read."""
    for pattern, plain in REWRITTEN:
        text = pattern.sub(plain, text)
    text = text.strip().rstrip(".,;:").strip()
    if not text or CLOCK_OR_DATE.fullmatch(text):
        return Words(text) if text else None
    number = without_latex(text)
    quantity = (said_twice(number) or read_quantity(number)) if "=" not in text else None
    if quantity:
        return Formula(rational(quantity.top) / rational(quantity.bottom), quantity)
    plain_text = TEXT.sub(r"\1", text).strip()
    if WORD_ANSWER.fullmatch(plain_text):
        letters = re.sub("[^A-Za-z]", "", plain_text)
        if len(letters) > 3 or letters.lower() in SHORT_WORDS or plain_text != text:
            return Words(plain_text)
    return read_parts(text)


def read_parts(text: str) -> Node | None:
    """Lists, approximations, unions, brackets and equations; anything else is one expression."""
    if member := re.match(r"[A-Za-z]\s*\\in(?![A-Za-z])", text):
        return read_node(text[member.end() :])
    matrix = r"\begin{" in text
    listed = re.sub(r",?\s*(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])", ";", THOUSANDS.sub(lambda m: m[0].replace(",", ""), text))
    items = split_top(listed, ";") if len(split_top(text, ";")) > 1 else split_top(listed, ",;")
    if len(items) > 1 and not matrix:
        return group("", items)
    exact, _, rounded = text.partition(r"\approx")
    if rounded:
        nodes = [read_node(rounded), read_node(exact)]
        return nodes[0] if None in nodes or NAME.fullmatch(exact) else group("≈", [rounded, exact])
    if r"\pm" in text and not matrix:
        return group("", [text.replace(r"\pm", one).replace(r"\mp", other) for one, other in ("+-", "-+")])
    parts = re.split(r"\\cup(?![A-Za-z])|(?<=[)\]}])\s*U\s*(?=[(\[\\])", text)
    if len(parts) > 1:
        union = group("", parts)
        return Union(union.items) if union else None
    if inside := bracketed(text):
        return read_brackets(*inside)
    if text == r"\emptyset":
        return Group("{}", ())
    sides = [side.strip() for side in split_top(text, "=")]
    if len(sides) > 1 and (not matrix or NAME.fullmatch(sides[0])):
        return read_equation(sides, text)
    return read_leaf(text)


def group(brackets: str, items: list[str]) -> Group | None:
    """The values of several texts; None if one cannot be read."""
    nodes: list[Node] = []
    for item in filter(str.strip, items):
        node = read_node(item)
        if node is None:
            return None
        several = r"\pm" in item and isinstance(node, Group) and node.brackets == ""
        nodes += node.items if several and isinstance(node, Group) else [node]
    return Group(brackets, tuple(nodes))


def bracketed(text: str) -> tuple[str, str] | None:
    """(the two brackets, what stands between them) if one pair of brackets encloses the whole text."""
    opening, closing = re.match(r"\\?\{|[(\[]", text), re.search(r"\\?\}$|[)\]]$", text)
    if not opening or not closing or closing.start() < opening.end():
        return None
    depth = n = 0
    for n in range(opening.end() - 1, len(text)):
        depth += (text[n] in "([{") - (text[n] in ")]}")
        if depth == 0:
            break
    brackets = opening[0][-1] + closing[0][-1]
    encloses = n == len(text) - 1 and brackets in ("()", "[]", "(]", "[)", "{}")
    return (brackets, text[opening.end() : closing.start()]) if encloses else None


def read_brackets(brackets: str, content: str) -> Node | None:
    builder = re.split(r"\||\\mid(?![A-Za-z])|:", content, maxsplit=1)
    if brackets == "{}" and len(builder) > 1:
        return read_node(builder[1])  # {x | x > 2}
    if re.search(r",\s", content):  # (1,000, 2,000)
        content = THOUSANDS.sub(lambda match: match[0].replace(",", ""), content)
    items = split_top(content, ",;") if content.strip() else []
    if len(items) > 1 or brackets == "{}":
        return group(brackets, items)
    return read_node(content) if brackets in ("()", "[]") else None


def read_equation(sides: list[str], text: str) -> Node | None:
    """`x = 5`, `5 = x`, `x = 5 \\pm 1` and calculations have a value; other equations are compared as equations."""
    if NAME.fullmatch(sides[0]) and not re.fullmatch(r"\|\s*[a-z]\s*\|", sides[0]):
        name, value = re.sub(r"\s", "", sides[0]), read_node(sides[-1])
        if isinstance(value, Group) and r"\pm" in sides[-1]:
            return Group("", tuple(Named(name, item, text) for item in value.items))
        return Named(name, value, f"{sides[0]}={sides[-1]}") if value else None
    if len(sides) == 2 and NAME.fullmatch(sides[1]) and not re.search("[A-Za-z]", COMMAND.sub("", sides[0])):
        return read_equation(sides[::-1], text)
    if not re.search("[A-Za-z]", COMMAND.sub("", TEXT.sub("", UNIT_BEHIND.sub("", text)))):
        return read_node(sides[-1])
    return read_leaf(text) if len(sides) == 2 else None


def read_leaf(text: str) -> Formula | Group | None:
    """One expression, read by math-verify; a unit behind it is taken off."""
    unit = UNIT_BEHIND.search(text)
    if SEVERAL_NUMBERS.search(text) or CLOCK_WORD.search(text) or (has_prose(TEXT.sub("", text)) and not unit):
        return None
    text = UNIT_BEHIND.sub("", re.sub(r"^\\?[$€£¥]", "", text).replace("$", ""))
    percent = bool(re.search(r"\\?%\s*$", text))
    text = re.sub(r"\\?%\s*$", "", text).strip()
    if based := BASED.fullmatch(text):
        return Formula(sympy.Symbol(f"{based[1]} in base {based[2]}"))
    *firsts, last = text.split(":")
    if firsts:  # 2:4:6 is 1:2:3
        scaled = [read_leaf(rf"\frac{{{first}}}{{{last}}}") for first in firsts]
        return scaled[0] if len(scaled) == 1 else None if None in scaled else Group("::", tuple(filter(None, scaled)))
    parsed = parse(f"${text}$", EXTRACTION, fallback_mode="no_fallback", parsing_timeout=None)
    if not parsed:
        return None
    expression = exact(parsed[0])
    if isinstance(expression, sympy.FiniteSet):
        return Group("", tuple(map(Formula, expression.args)))
    known = read_unit(TEXT.sub(r"\1", unit[0])) if unit else None
    return Formula(expression, Quantity(Decimal(1), percent=percent, unit=known))


def exact(expression: Any) -> Any:
    """An expression with a fraction for each decimal and the imaginary unit for the variable i."""
    if isinstance(expression, MatrixBase):
        return expression.applyfunc(exact)
    if not isinstance(expression, Basic):
        return expression
    changed: dict[Any, Any] = {number: Rational(str(number)) for number in expression.atoms(Float)}
    changed |= {symbol: sympy.I for symbol in expression.atoms(sympy.Symbol) if symbol.name == "i"}
    return expression.xreplace(changed)


def rational(number: Decimal) -> Rational:
    return Rational(*number.as_integer_ratio())
