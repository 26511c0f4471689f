"""Reads one number with its unit: `-1,234.5`, `3/4`, `2 1/2`, `1.5 x 10^-3`, `70k`, `$18.00`, `25%`, `5 km`, `eighteen`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction
from typing import Any

CONTEXT = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)


@dataclass(frozen=True)
class Unit:
    """A unit of measurement; `each` is the unit behind `per`."""

    kind: str  # what it measures; two kinds cannot be compared
    factor: Fraction  # size in the base unit of its kind
    each: "Unit | None" = None


@dataclass(frozen=True)
class Quantity:
    """`top / bottom`, both exact, with its percent sign and its unit, None if it has none that is known."""

    top: Decimal
    bottom: Decimal = Decimal(1)
    percent: bool = False
    unit: Unit | None = None
    decimals: int = 0  # digits behind the point, as written

    @property
    def value(self) -> Decimal:
        """The number to 60 digits; exact if there is no denominator."""
        return self.top if self.bottom == 1 else CONTEXT.divide(self.top, self.bottom)

    @property
    def plain_value(self) -> Decimal:
        """The value, of a percentage as a share of one."""
        return self.value.scaleb(-2, CONTEXT) if self.percent else self.value


SIZES = {
    "length": "mm millimeter millimetre 0.001, cm centimeter centimetre 0.01, m meter metre 1, km kilometer kilometre 1000, "
    "inch inches 0.0254, ft foot feet 0.3048, yd yard 0.9144, mi mile 1609.344",
    "mass": "mg milligram 0.001, g gram 1, kg kilogram 1000, oz ounce 28.349523125, lb lbs 453.59237, ton tonne 1000000",
    "time": "ms millisecond 0.001, s sec second 1, min minute 60, h hr hour 3600, day 86400, week 604800",
    "months": "month 1, year yr 12",
    "length 2": "acre 4046.8564224, hectare ha 10000",
    "length 3": "ml milliliter millilitre cc 0.000001, l liter litre 0.001, gallon gal 0.003785411784",
    "force": "n newton 1",
    "energy": "j joule 1, kj kilojoule 1000",
    "power": "w watt 1, kw kilowatt 1000",
    "frequency": "hz hertz 1, khz kilohertz 1000",
    "dollars": "$ dollar usd 1, ¢ cent 0.01",
    "euros": "€ euro eur 1",
    "pounds": "£ gbp 1",
    "yen": "¥ yen 1",
    "angle": "° degree deg 1",
    "Celsius": "°c celsius 1",
    "Fahrenheit": "°f fahrenheit 1",
}
UNITS = {
    name: (kind, Fraction(words[-1]))
    for kind, sizes in SIZES.items()
    for words in (size.split() for size in sizes.split(", "))
    for name in words[:-1]
}
SPEEDS = {"mph": "mile/hour", "kph": "km/h", "kmh": "km/h"}
UNIT = re.compile(
    r"\s*(?:(?P<square>square|sq\.?)\s+|(?P<cubic>cubic|cu\.?)\s+)?(?P<name>°\s*[CcFf]\b|[$€£¥¢°]|[A-Za-z]+)"
    r"\s*(?:\^?\{?(?P<power>[23])\}?)?(?:\s*(?:/|\bper\b|\ban?\b)\s*(?P<each>[A-Za-z]+))?"
)

SCALES = {
    "k": 1000, "hundred": 100, "dozen": 12, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
CARDINALS = {word: number for number, word in enumerate(SMALL.split())} | {
    word: 10 * number for number, word in enumerate(TENS.split(), start=2)
}
PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10,
         "hundredth": 100, "thousandth": 1000, "millionth": 10**6}  # fmt: skip
CARDINAL = rf"(?:{'|'.join(sorted(CARDINALS, key=len, reverse=True))}|hundred|dozen|thousand|million|billion)"
IN_WORDS = re.compile(
    rf"\b(?:(?:minus|negative)\s+)?(?:(?:half\s+)?an?\s+(?=[htmbd]))?{CARDINAL}(?:(?:\s+and\s+|\s+|-){CARDINAL}){{0,20}}"
    rf"(?:(?:[\s-]+|\s+and\s+an?\s+)(?:{'|'.join(PARTS)})s?)?\b|\b(?:a )?half\b|\ban? (?:{'|'.join(PARTS)})\b",
    re.IGNORECASE,
)

MONTHS_AND_DAYS = (
    "january february march april may june july august september october november december "
    "monday tuesday wednesday thursday friday saturday sunday"
)
DAYS = MONTHS_AND_DAYS.split()
CLOCK_OR_DATE = re.compile(rf"(?<![A-Za-z])(?:[ap]\.?m\b\.?|o'?clock|noon|midnight|or|{'|'.join(DAYS)})\b", re.IGNORECASE)
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ _']\d{3})+(?!\d)|\d+)"
QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<money>[$€£¥]|usd\s|eur\s|)\s*(?P<inner>[-+]?)"
    rf"(?:(?:(?P<whole>\d+)(?:\s+and)?\s+)?(?P<top>{DIGITS}(?:\.\d+)?)\s*/\s*(?P<bottom>{DIGITS}(?:\.\d+)?)"
    rf"|(?:(?P<times>{DIGITS}(?:\.\d*)?|\.\d+)\s*[x×*·]\s*)?10\s*\^\s*\{{?\(?(?P<power>[-+]?\d+)\)?\}}?(?![\d.])"
    rf"|(?P<number>{DIGITS}(?:\.\d*)?|\.\d+)(?:e(?P<exponent>[-+]?\d+)(?![\d.]))?)"
    rf"(?:(?P<k>k)(?![A-Za-z])|\s*-?\b(?P<scale>{'|'.join(word for word in SCALES if word != 'k')})s?\b)?"
    r"\s*(?P<percent>%|per\s?cent(?:age)?(?:\s+points?)?\b|pct\b)?(?P<unit>.*)",
    re.IGNORECASE | re.DOTALL,
)
# What may follow a number: words, and powers of a unit; no digits, operators or variables.
UNIT_TEXT = re.compile(r"(?:[$€£¥¢°.,'’\"\s]|/(?=\s*[A-Za-z])|[A-Za-z]++(?:\^?\{?[23]\}?(?!\d))?|-(?=[A-Za-z]))*")
VARIABLE = re.compile(r"(?:[xyznijπ]|pi|e)\b", re.IGNORECASE)
ABOUT = re.compile(r"\s*(?:about|approximately|approx\.?|roughly|around|exactly|just|only|≈|~)\s*", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z][^-+*/^<>≤≥≠±×÷]*")  # what stands before `=`: x, f(2), Total cost
NEXT_PART = re.compile(r"(?:(?<=[A-Za-z.])|(?<=[$€£]\d)|(?<=[$€£]\d\d))(?:\s*,?\s*\band\b\s+|\s*,\s*|\s+)(?=\d)")
MILLION = re.compile(r"(?<=\d)\s?M(?![A-Za-z])")
NO_GROUPS = str.maketrans("", "", ", _'")


def read_quantity(text: str) -> Quantity | None:
    """The one number that a text states, without LaTeX; None if it states none, several, a bound, a time or a date.

    Of an equation the last side with a number counts; `2x = 4` is no number.
    """
    sides = [side.strip() for side in re.split(r"(?<![<>!])=", text)]
    if any(re.search(r"[,;]\s*[A-Za-z]", side) for side in sides[1:-1]):
        return None  # p = 5, q = 2
    values = [read_side(side) for side in sides]
    fits = all(value or is_name(side) for side, value in zip(sides, values, strict=True))
    return next(filter(None, reversed(values)), None) if fits else None


def read_readings(text: str) -> list[Quantity]:
    """The number that a text states, and with "100/3 ≈ 33.33" also what it is rounded from."""
    about = ABOUT.match(text)
    parts = text[about.end() if about else 0 :].split("≈")
    *exact, last = [read_quantity(part) for part in parts]
    if last is None or not all(number or is_name(part) for part, number in zip(parts, exact, strict=False)):
        return []
    return [last, *(number for number in exact if number and is_rounded(number.value, last))]


TWICE = re.compile(r",\s+|;\s*|\s+or\s+|\s+\((?:=|i\.e\.|or|that is)?[\s,]*(?=[^()]*\)$)", re.IGNORECASE)


def said_twice(text: str) -> Quantity | None:
    """The number of a text that says one number in several ways, "18, 18.00", "1/2 (0.5)", "1/2 or 50%"; else None."""
    parts = TWICE.split(text.strip().removesuffix("."))
    quantities = [read_quantity(part.removesuffix(")") if "(" not in part else part) for part in parts] if len(parts) > 1 else []
    first = quantities[0] if quantities else None
    if first is None:
        return None
    same = all(other and other.unit == first.unit and other.plain_value == first.plain_value for other in quantities[1:])
    return first if same else None


def is_rounded(exact: Decimal, written: Quantity) -> bool:
    """Whether a number is `exact`, rounded to the digits that it is written with."""
    return CONTEXT.subtract(exact, written.value).copy_abs() <= Decimal(f"5e-{written.decimals + 1}")


def is_name(text: str) -> bool:
    """Whether a side of an equation is a name or a calculation, not an expression of a variable."""
    text = COMMAND.sub("", text)
    return NAME.fullmatch(text.strip()) is not None or not re.search(r"[^\W\d_]|[<>≤≥≠±]", text)


def read_side(text: str) -> Quantity | None:
    """The number of a text without `=`."""
    about = ABOUT.match(text)
    text = MILLION.sub(" million", text[about.end() if about else 0 :].strip())
    if text[:1] + text[-1:] in ("()", "[]", "{}") and not re.search(r"[()\[\]{},]", text[1:-1]):
        text = text[1:-1].strip()
    match = QUANTITY.fullmatch(text.rstrip(" .?,;:"))
    if match is None:
        digits = text if re.search(r"\d", text) else IN_WORDS.sub(lambda words: in_digits(words[0]), text)
        return read_side(digits) if digits != text else None
    part, follows = match.groupdict(), match["unit"]
    if not UNIT_TEXT.fullmatch(follows):
        return read_compound(text)
    if CLOCK_OR_DATE.search(follows):
        return None
    if VARIABLE.match(follows) and not (text[match.start("unit") - 1].isspace() and follows[:1] in ("N", "J")):
        return None
    top, bottom = number_of(part), Decimal((part["bottom"] or "1").translate(NO_GROUPS))
    if top.is_nan() or bottom == 0 or (part["sign"] and part["inner"]):
        return None
    if part["whole"]:
        top = CONTEXT.add(top, CONTEXT.multiply(Decimal(part["whole"]), bottom))
    if part["k"] or part["scale"]:
        top = CONTEXT.multiply(top, Decimal(SCALES[(part["k"] or part["scale"]).lower()]))
    top = top.copy_negate() if "-" in (part["sign"], part["inner"]) else top
    point = re.search(r"\.(\d+)", part["number"] or "")
    decimals = len(point[1]) if point and not (part["k"] or part["scale"] or part["exponent"]) else 0
    return Quantity(top, bottom, bool(part["percent"]), read_unit(part["money"] or follows), decimals)


def read_compound(text: str) -> Quantity | None:
    """`1 hour 30 minutes`, `5 feet 3 inches`, `$4 and 50 cents`: each part is less than one of the unit before it."""
    parts = [part for part in NEXT_PART.split(text.strip(" .")) if part]
    quantities = [read_side(part) for part in parts] if 2 <= len(parts) <= 4 else []
    total, least = Fraction(0), None
    for quantity in quantities:
        if quantity is None or quantity.unit is None or quantity.unit.each or quantity.percent or quantity.top.adjusted() > 30:
            return None
        size = Fraction(quantity.top) / Fraction(quantity.bottom) * quantity.unit.factor
        if least and not (least.kind == quantity.unit.kind and 0 <= size < least.factor):
            return None
        total, least = total + size, quantity.unit
    first = quantities[0].unit if quantities and quantities[0] else None
    if first is None or total <= 0:
        return None
    value = total / first.factor
    return Quantity(Decimal(value.numerator), Decimal(value.denominator), unit=first)


def number_of(part: dict[str, str]) -> Decimal:
    """The number in a match of QUANTITY, without sign, whole part, denominator and scale; NaN if it is too large for any use."""
    digits = (part["top"] or part["times"] or part["number"] or "1").translate(NO_GROUPS)
    shift = part["exponent"] or part["power"] or "0"
    return Decimal(f"{digits}e{shift}") if len(shift) <= 6 else Decimal("nan")


def in_digits(words: str) -> str:
    """`minus forty-two` -> -42, `three quarters` -> 3/4, `two and a half` -> 2 1/2, for what IN_WORDS matches."""
    parts = re.findall(r"[a-z]+", words.lower())
    sign = "-" if parts[0] in ("minus", "negative") else ""
    last = parts[-1] if parts[-1] in PARTS else parts[-1].removesuffix("s")
    bottom = PARTS.get(last)
    total = group = 0
    for word in parts[:-1] if bottom else parts:
        if word == "hundred":
            group = max(group, 1) * 100
        elif word in SCALES:
            total, group = total + max(group, 1) * SCALES[word], 0
        else:
            group += CARDINALS.get(word, 0)
    if parts[0] == "half" and total + group:  # half a dozen
        return f"{total + group}/2"
    if bottom and total + group and parts[-2] in ("a", "an"):
        return f"{sign}{total + group} 1/{bottom}"
    return f"{sign}{(total + group) or int(bottom is not None)}{f'/{bottom}' if bottom else ''}"


def read_unit(text: str) -> Unit | None:
    """The unit that a text begins with; None if it is not known."""
    first = re.match(r"\s*(\w*)", text)
    text = SPEEDS.get(first[1].lower(), text) if first else text
    match = UNIT.match(text)
    known = named_unit(match["name"]) if match else None
    if match is None or known is None:
        return None
    power = 2 if match["square"] else 3 if match["cubic"] else int(match["power"] or 1)
    kind, factor = known
    each = named_unit(match["each"]) if match["each"] else None
    return Unit(f"{kind} {power}" if power > 1 else kind, factor**power, Unit(*each) if each else None)


def named_unit(name: str) -> tuple[str, Fraction] | None:
    name = re.sub(r"\s", "", name).lower()
    return UNITS.get(name) or (UNITS.get(name.removesuffix("s")) if len(name) > 2 else None)


def unit_ratio(gold: Unit | None, response: Unit | None) -> Fraction | None:
    """By what a response's number is multiplied to be in the unit of the gold answer; None if they cannot be compared.

    A unit that only one of the two names is taken for the other's.
    """
    if gold is None or response is None:
        return Fraction(1)
    each = unit_ratio(gold.each, response.each)
    return response.factor / gold.factor / each if each and gold.kind == response.kind else None


def factors(gold: Quantity, response: Quantity, size: Any) -> Iterator[tuple[Fraction, Fraction]]:
    """(factor of the gold number, factor of the response's number) for each way in which the two may be compared.

    `size` is the number of the gold answer. `25%` is 0.25 and, where the other is 25 without a sign, also that; `0.5%` is no 0.5.
    """
    ratio = unit_ratio(gold.unit, response.unit)
    if ratio is None:
        return
    if gold.percent or not response.percent or abs(size) > 1:
        yield Fraction(1), ratio
    if gold.percent != response.percent:
        yield (Fraction(1, 100), ratio) if gold.percent else (Fraction(1), ratio / 100)


LATEX_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|\\,|,?\s*\\!\s*,?\s*)(?=\d{3}(?!\d))")  # 70{,}000 and the like
COMMAND = re.compile(r"\\[A-Za-z]+")
LATEX = (
    (LATEX_GROUPS, ","),
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr?|limits|quad|qquad)(?![A-Za-z])|(?<!\\)\\(?:[;:!]|(?=\s))|~"), " "),
    (re.compile(r"\\,"), " "),
    (re.compile(r"(?<=\d)\s*\\[dtc]?frac\s*(?=[\d{])"), r" \\frac"),
    (re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))"), r"\1\2/\3\4"),
    (re.compile(r"\\(?:text|math|mbox|operatorname|rm)[a-z]*\s*\{\s*([^{}]*?)\s*\}"), r" \1"),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degrees?|\\circ"), "°"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "×"),
    (re.compile(r"\\approx(?![A-Za-z])"), "≈"),
    (re.compile(r"\\([$%&#_])"), r"\1"),
    (re.compile(r"(?<![\^A-Za-z}])\{\s*([-+]?[\d.,/]+)\s*\}"), r"\1"),
)


def without_latex(text: str) -> str:
    """A number in LaTeX as plain text; what is no number keeps its commands, and is none."""
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    return text.strip()
