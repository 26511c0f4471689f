"""What is read of a response: what follows its thinking, in plain characters, with one sign for each box and formula.

Also here: how a value is cut out of its text.
"""

import re
import unicodedata

TAG = re.compile(
    r"[<◁](/?)(?:(?:seed:)?think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad)[>▷]|\[(/?)THINK\]"
    r"|<\|(?:begin|(end))_of_thought\|>|<\|channel\|>(?:(final)|analysis|commentary)[^<>]*<\|message\|>",
    re.IGNORECASE,
)


def visible(response: str) -> str:
    """The response without its thinking, whose opening tag may stand in the prompt; "" if the thinking is not finished."""
    parts: list[str] = []
    thinking, start = False, 0
    for tag in TAG.finditer(response):
        if any(tag.groups()):
            parts = parts if thinking else []
            thinking = False
        elif not thinking:
            parts.append(response[start : tag.start()])
            thinking = True
        start = tag.end()
    return "" if thinking else "\n".join([*parts, response[start:]]).strip()


SIGNS = str.maketrans({
    **dict.fromkeys("\t\u00a0\u2007\u2008\u2009\u200a\u202f\u3000", " "), **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"), **dict.fromkeys("\u22c5\u2219\u2022", "·"),
    **dict.fromkeys("\u2044\u2215", "/"), "\u2236": ":", "\u2032": "'", "\ufe6a": "%", "\u00ba": "°", "\u02da": "°",
})  # fmt: skip
VULGAR = re.compile(r"(\d?)([¼½¾⅐-⅞])")
SUPERSCRIPT = re.compile(r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+")
BOLD = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])|(?<=[^\W\d_])\*\*|`|__")
NOTE = re.compile(r"<<[^<>\n]*>>|~~[^~\n]*~~|<\|\w+\|>")  # the calculator's <<3+4=7>>; what is struck out; special tokens
OPERATOR = re.compile(r"(?<=\d) (plus|minus|times|divided by) (?=[-$\d])")
OPERATORS = {"plus": "+", "minus": "-", "times": "×", "divided by": "/"}
AND_A_HALF = re.compile(r"(?<=\d) and (?:a|one)[ -](half|third|quarter)\b", re.IGNORECASE)
FRACTIONS = {"half": "1/2", "third": "1/3", "quarter": "1/4"}
NEGATIVE = re.compile(r"\b(?:minus|negative) (?=[$€£]?\d)", re.IGNORECASE)


def tidy(text: str) -> str:
    """A text in plain digits, signs and spaces, without bold type and notes."""
    text = NOTE.sub("", text)
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # \\\\frac, escaped twice
    if not text.isascii():
        text = VULGAR.sub(lambda match: match[1] + " " * bool(match[1]) + normal(match[2]), text)
        text = SUPERSCRIPT.sub(lambda match: "^{" + normal(match[0]) + "}", text).translate(SIGNS)
        text = "".join(map(plain_character, text))
    text = OPERATOR.sub(lambda match: f" {OPERATORS[match[1]]} ", BOLD.sub("", text.replace("\t", " ")))
    text = AND_A_HALF.sub(lambda match: f" {FRACTIONS[match[1].lower()]}", text)
    return NEGATIVE.sub("-", text)


def normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(SIGNS)


def plain_character(character: str) -> str:
    """A digit of any script, and a full-width sign, as ASCII."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return normal(character) if "\uff01" <= character <= "\uff5e" else character


BOXES, FORMULAS = 0x100000, 0xF0000  # private use: boxes from here on, formulas below
BOX_SIGN, FORMULA_SIGN, SIGN = "[\U00100000-\U0010ffff]", "[\U000f0000-\U000fffff]", "[\U000f0000-\U0010ffff]"
BOX = re.compile(r"\\f?boxed\s*|\\fbox\s*")
CUT = r"\cut"  # in place of a box that is never closed
UNBRACED = re.compile(r"[^\s$.,]*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
LISTED = re.compile(r"[,;&/|]|\b(?:and|or)\b")
BETWEEN_BOXES = re.compile(
    r"(?:(?:\s[a-z]+){1,2}\s(?=(?:and|or)\s))?"  # \boxed{1} bin and \boxed{2} papers
    r"(?:\s|\$|\\[,;:!() ]|\\quad|\\text\{\s*(?:and|or)\s*\}|[,;&/|]|\band\b|\bor\b|\b[A-Za-z](?:_\w)?\s*=)*"
)
FORMULA = re.compile(
    r"\$\$(?P<a>.{1,2000}?)\$\$|\\\[(?P<b>(?:(?!\\\[).){1,2000}?)\\\]|\\\((?P<c>(?:(?!\\\().){1,2000}?)\\\)"
    r"|(?P<d>\\begin\{(?P<environment>\w+\*?)\}.{1,2000}?\\end\{(?P=environment)\})"
    r"|(?<![\\$])\$(?=[^\s$])(?P<e>(?:\\.|[^$\\\n]){1,2000}?)(?<=[^\s\\])\$(?!\d)"  # `$` is money if it touches no formula
    r"|(?<![\\$])\$ (?P<f>(?:\\.|[^$\\\n]){1,2000}?) \$(?!\d)",
    re.DOTALL,
)
ALIGNED = re.compile(r"\\begin\{(align|aligned|gather|gathered|equation|split)\*?\}(.*?)\\end\{\1\*?\}", re.DOTALL)
UNEQUAL = re.compile(r"(?:\\neq?|≠)\s*$")
COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[A-Za-z ]*\})?")  # and an argument of letters, as in \text{ cm}
WORD = re.compile(
    r"(?<![A-Za-z\\{])(?!(?:sin|cos|tan|log|ln|exp|sqrt|max|min|mod|and|or|pi|[A-Z]{2,4})\b)[A-Za-z]{2,}(?![A-Za-z}])"
)


def has_prose(text: str) -> bool:
    """Whether a text has words that are not mathematics."""
    return WORD.search(COMMAND.sub(" ", text)) is not None


class HeldText:
    """A text in which one sign of Unicode's private use stands for each box and each formula; `pieces` is what they hold."""

    def __init__(self, text: str):
        self.pieces: dict[str, str] = {}
        self.text = FORMULA.sub(self.hold_formula, self.hold_boxes(re.sub(SIGN, "", text)))

    def hold(self, first: int, piece: str) -> str:
        sign = chr(first + min(len(self.pieces), 0xFFF0))
        self.pieces[sign] = self.restore(piece)
        return sign

    def restore(self, text: str) -> str:
        return re.sub(SIGN, lambda match: self.pieces[match[0]], text)

    def hold_boxes(self, text: str) -> str:
        """Boxes in a list ("\\boxed{1} and \\boxed{2}") are one answer; of a box that is cut only CUT is held."""
        parts: list[str] = []
        start, ends = 0, group_ends(text)
        for box in BOX.finditer(text):
            if box.start() < start:
                continue  # inside a box
            braced = text[box.end() : box.end() + 1] == "{"
            end = ends.get(box.end(), 0) if braced else UNBRACED.match(text, box.end()).end()  # type: ignore[union-attr]
            content = box_content(text[box.end() : end]) if end else CUT
            if re.match(r"\s*\\?%", text[end : end + 3]):
                content += "%"
            between = text[start : box.start()]
            if parts and len(between) < 80 and LISTED.search(between) and BETWEEN_BOXES.fullmatch(between):
                before = self.pieces[parts[-1]]
                parts[-1] = self.hold(BOXES, content if content == before else f"{before}, {content}")
            else:
                parts += [between, self.hold(BOXES, content)]
            start = end or box.end()
        return "".join([*parts, text[start:]])

    def hold_formula(self, match: re.Match) -> str:
        content = next(match[name] for name in "abcdef" if match[name])
        boxes = list(re.finditer(BOX_SIGN, content))
        if boxes:
            denied = UNEQUAL.search(content[: boxes[-1].start()])
            return f"not {boxes[-1][0]}" if denied else boxes[-1][0]
        if ((match["e"] and "\\" not in content) or match["f"]) and has_prose(content):
            return match[0]  # it costs $5 a day, in all $6
        return self.hold(FORMULAS, ALIGNED.sub(last_row, content))


def last_row(match: re.Match) -> str:
    """The last row of an aligned derivation."""
    return match[2].strip().removesuffix(r"\\").rpartition(r"\\")[2].replace("&", " ")


def box_content(text: str) -> str:
    """What a box holds, without its braces; a box inside it counts as what it holds."""
    text = BOX.sub("", text).strip()
    ends, peeled = group_ends(text), 0
    while ends.get(peeled) == len(text) - peeled:
        peeled += 1
    return text[peeled : len(text) - peeled].strip()


def group_ends(text: str) -> dict[int, int]:
    """`{start: end}` of every group in braces that is closed."""
    ends: dict[int, int] = {}
    opened: list[int] = []
    for brace in BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            ends[opened.pop()] = brace.end()
    return ends


def trim(text: str) -> str:
    """A value without the punctuation, the quotes and the single brackets around it."""
    text = text.lstrip(' \n*=:,;/^%!~)]}"').rstrip(' \n=:,;*/^([<>~"-\\')
    if len(text) > 2 and text[0] == text[-1] == "'":
        text = text[1:-1]
    text = text.strip("| ") if text.count("|") % 2 else text
    opened = min((n for n in map(text.find, "([") if n >= 0), default=len(text))
    pair = opened < max(map(text.rfind, ")]")) or r"\{" in text  # [0, 1) is a pair
    for opening, closing in ("()", "[]", "{}"):
        if (opening in text) != (closing in text) and not pair:
            text = text.removeprefix(opening).removesuffix(closing)
    return text.strip()


def last_step(text: str) -> str:
    """Of calculations in a row, "5+3=8, 8*2=16", the last."""
    steps = split_top(text, ",;")
    calculated = len(steps) > 1 and any("=" in step and not re.search(r"[A-Za-z]", step.split("=")[0]) for step in steps[:-1])
    return steps[-1].strip() if calculated else text


def split_top(text: str, separators: str) -> list[str]:
    """The parts of a text between separators that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for n, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        elif depth == 0 and character in separators and text[n - 1 : n] != "\\":
            parts.append(text[start:n])
            start = n + 1
    return [*parts, text[start:]]
