"""What a response states as its answer: its last box or the last sentence that names the answer, else its last value.

Of several values beside each other ("4, 5 or 6") all are the answer, so that a list of candidates is no right answer. What is
denied ("not 4", "4 is wrong") is no answer, and a later statement counts more than an earlier one.
"""

import bisect
import re
from dataclasses import dataclass

from evolve_ray.score.held_text import BOX_SIGN, CUT, FORMULA_SIGN, HeldText, has_prose, last_step, tidy, trim, visible
from evolve_ray.score.quantities import DAYS, IN_WORDS, SCALES, in_digits, read_unit


@dataclass(frozen=True)
class Statement:
    """The answer of a text.

    `value` is its mathematics, without delimiters, "" if there is none. `words` is all that is said about it. `marked` is true
    if the text itself says that this is the answer.
    """

    value: str
    words: str
    marked: bool


# ---- values: runs of mathematics in prose


TOKEN = re.compile(
    rf"(?P<B>{BOX_SIGN})|(?P<formula>{FORMULA_SIGN})"
    r"|(?P<E>\n|[.!?]+(?=[\s)\"'*]|$))"
    r"|(?P<number>(?:[$€£¥]\s?)?(?<![A-Za-z]{2}-)(?<![\w.])(?:\d++(?:[,_']\d+)*+(?:\.\d++)*+|\.\d++)(?!-[A-Za-z]{2})[A-Za-z]*\d?(?!\w))"
    r"|(?P<command>\\(?:[A-Za-z]+|[{}%$|])(?:\s?\{(?:[^{}\n]|\{(?:[^{}\n]|\{[^{}\n]*\})*\})*\}|\[[^\]\n]{1,40}\])*|[∞π√]"
    r"|(?:sqrt|log|ln|sin|cos|tan|exp)(?=\s?[\d(\\])|\bpi\b)"
    r"|(?P<L>(?<![A-Za-z0-9])[A-Za-z](?![A-Za-z'’]|/[a-z]))"
    r"|(?P<W>\w[\w'’-]*(?:/[A-Za-z]+)?(?:\^\{?[23]\}?(?!\d))?)"
    r"|(?P<C>[,;&])|(?P<sign>[-+*/^=<>≤≥≠±×÷·|_(){}\[\]:%°!~≈])|(?P<space>[ \r]+)|(?P<other>.)",
    re.DOTALL,
)
SPACING = re.compile(r"\\(?:quad|qquad|left|right|[{}%$|])$")
WORDS_OF_KIND = {
    "O": "or and/or",
    "A": "and to through versus vs",
    "M": "maybe possibly perhaps even else also probably alternatively otherwise",
    "V": "is are was were be has have had remain remains",
}
KIND_OF_WORD = {word: kind for kind, words in WORDS_OF_KIND.items() for word in words.split()}
BEHIND_NUMBER = {"am", "pm", "o'clock", "percent", "percentage", *SCALES, *DAYS}
EXPRESSION = r"(?<![S(])[S(]*+[NL](?:[S()]+[NL]|N)*[S)]*(?:U+(?:C?A?NU+)*)?"  # also "5 hours and 30 minutes"
ANOTHER = EXPRESSION.removeprefix(r"(?<![S(])")
# "4, 5 or 6", "4 apples or 5", "5 (or 6)"; but in "18, and 5 are left" the 5 begins another sentence.
NEXT = rf"(?:\(?[WVU]{{0,3}}C?E?O|[CW]?(?=M)|C?A(?=M*{ANOTHER}(?!V))|C(?={ANOTHER}(?!V)))M*{ANOTHER}"
RUN = re.compile(rf"{EXPRESSION}(?:{NEXT})*")
STATED_RUN = re.compile(rf"{EXPRESSION}(?:{NEXT}|[WU]{{1,3}}C?A(?={ANOTHER}(?!V)){ANOTHER})*")  # also "5 hours and 30 minutes"
NOT = re.compile(
    r"(?:\bnot|\bcannot|n't|\bnever|\bneither|\bnor|≠|\\neq?(?![A-Za-z])|instead of|rather than|other than|except|unlike"
    r"|anything but|\bdoubt|\bfalse that|\bunlikely)"
    r"(?:\s+(?:equal to|equal|just|exactly|be|actually|simply|necessarily|the|a|an|that|to|is|it|answer|in|fact|correct))*"
    r"\s*[($]?$",
    re.IGNORECASE,
)
IS_WRONG = re.compile(
    r"\s*[)$]?,?\s*(?:(?:is|was|are|would be|seems)\s+(?:\w+\s+)?(?:wrong|incorrect|false|not|impossible|too)\b|(?:is|was)n't\b)",
    re.IGNORECASE,
)
ONCE = re.compile(
    r"\b(?:first|initially|originally|previously|earlier|mistakenly|wrongly)\s+(?:(?:I|we)\s+)?"
    r"(?:had|got|wrote|thought|found|said|gave|put|answered|computed)(?:\s+(?:that|it|was|is))*[\s:($]*$",
    re.IGNORECASE,
)
BOUND = re.compile(
    r"\b(?:at least|at most|at minimum|at maximum|(?:more|less|fewer|greater|larger|smaller|bigger|higher|lower) than|over|under"
    rf"|above|below|up to|between|minimum of|maximum of|nearly|almost|as (?:many|much) as|{'|'.join(DAYS)})\s+(?:about\s+)?$",
    re.IGNORECASE,
)
OR_MORE = re.compile(
    r"(?:\s+[a-z]+)?\s+at\s+(?:the\s+)?(?:most|least)\b|(?:\s+[a-z]+)?\s*(?:or|and)\s+(?:more|less|fewer|greater|larger|smaller|above|below|up|higher|lower|another|some|so)\b|\+(?=\s|$)"
    rf"|\s+of\s+(?:{'|'.join(DAYS)})\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Run:
    """A value in prose, `text[start:end]`; `state` is "denied", "vague" (a bound, a part of a date) or ""."""

    start: int
    end: int
    state: str


class Tokens:
    """The tokens of a text as a string of their kinds.

    B box, N number or formula, L variable, S sign, ( ) brackets, C comma, O or, A and, M maybe, U unit, V verb, W other word,
    E end of a sentence or line.
    """

    def __init__(self, text: str):
        self.text = text
        self.starts: list[int] = []
        self.ends: list[int] = []
        kinds = [""]
        for match in TOKEN.finditer(text):
            if match.lastgroup != "space":
                kinds.append(self.kind(match, kinds[-1]))
                self.starts.append(match.start())
                self.ends.append(match.end())
        self.kinds = "".join(kinds)

    def kind(self, match: re.Match, before: str) -> str:
        name, piece, behind = match.lastgroup or "", match[0], self.text[match.end() : match.end() + 2]
        spaced = self.text[match.start() - 1 : match.start()] == " "
        if name in ("formula", "number"):
            return "N"
        if name == "command":
            return "S" if SPACING.match(piece) else "N"
        if name == "L":
            unit = before == "N" and piece in "msghlLJNW" and behind.lstrip(" ")[:1] not in tuple("+-*/^=<>")
            return "U" if unit else "L"
        if name == "W":
            behind_number = before in ("N", "U") and (piece.lower() in BEHIND_NUMBER or read_unit(piece))
            return KIND_OF_WORD.get(piece.lower()) or ("U" if behind_number else "W")
        if piece in ("(", "[", "{"):
            return "W" if spaced and before in ("N", "U") else "("  # "18 (9 times 2)"
        if piece in (")", "]", "}"):
            return ")"
        # "is - 18" and "Answer: - 18" have a minus; "apples - 18 of them" has a dash.
        minus = behind[1:].isdigit() and (before == "V" or self.text[: match.start()].rstrip(" ").endswith(":"))
        dash = piece == "-" and before in ("W", "U", "V") and behind[:1] == " " and not minus
        colon = piece == ":" and not behind[:1].isdigit()
        return "W" if dash or colon or name == "other" else "S" if name == "sign" else name

    def runs(self, first: int, last: int, pattern: re.Pattern) -> list[Run]:
        """The values in the tokens `first` to `last`, in their order."""
        found = []
        for match in pattern.finditer(self.kinds[first:last]):
            if "N" not in match[0] and not re.search(r"L[S()]*S[S()]*L", match[0]):
                continue
            start, end = self.starts[first + match.start()], self.ends[first + match.end() - 1]
            before = re.split(r"[.!?\n]\s", self.text[max(0, start - 60) : start])[-1]
            if NOT.search(before) or IS_WRONG.match(self.text, end):
                state = "denied"
            else:
                state = "vague" if BOUND.search(before) or OR_MORE.match(self.text, end) else ""
            found.append(Run(start, end, state))
        return found


# ---- statements


MARK = re.compile(
    rf"(?P<box>{BOX_SIGN})"
    r"|(?P<hash>^[ ]*\#{4}(?!\#)[ ]*)"
    r"|(?P<tag><answer>)"
    r"|(?P<says>\b(?:answers?|(?:correct|right|true|actual|real) (?:option|choice|one|value|result|number|total))\b"
    r"[^.!?\n:=]{0,60}?(?:\b(?:is|are|was|be|becomes|equals)\b(?:[ ]*:)?|=))"
    r"|(?P<label>(?:^[ *#>_-]*(?:A|Ans)\b|\banswers?\b[^.!?\n:=]{0,60}?)\s{0,9}(?::|\n))"
    r"|(?P<fix>\b(?:no(?=[,:;.!-])|nope|wait|actually|sorry|oops|correction|rather|hmm+|scratch that|i mean|make that"
    r"|should be)\b)",
    re.IGNORECASE | re.MULTILINE,
)
FILLER = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|to|indeed|therefore|thus|then|so|simply|just|exactly|about|approximately|approx|roughly"
    r"|around|now|actually|by|the|a|an|number|value|amount|option|choice|either|both|it|it's|that|that's|should|would|must|no|wait"
    r"|not|but|given|final|correct|answer|total|of|say|all|one)\b|[^\w\s]|\s)*",
    re.IGNORECASE,
)
REASON = re.compile(r"\b(?:because|since|as|if|when|where|for|after|given|using)\b", re.IGNORECASE)
BECAUSE = re.compile(r"\b(?:because|since)\b", re.IGNORECASE)
ALTERNATIVE = r"(?:or|alternatively|maybe|perhaps|possibly)\b(?:,|\s|it is|it's|it could be|even)*"
OR_ELSE = re.compile(rf"(?:^|\W){ALTERNATIVE}[$({{]*$", re.IGNORECASE)
ALSO = re.compile(
    r"\b(?:could|might|may|can) also be\b|\balso possible\b|\banother possib"
    rf"|[.?!;\n]\s*{ALTERNATIVE}(?:[-$\d\\(]|{BOX_SIGN}|{FORMULA_SIGN})",
    re.IGNORECASE,
)
LEAD = re.compile(
    r"\W*(?:(?:so|thus|therefore|hence|then|i think|i believe|it is|it's|that is|that's|this is|is)\b[,:\s]*)+", re.IGNORECASE
)
UNIT_WORDS = re.compile(r"(?:[\s$)*]*\b(?!(?:is|are|was|were|has|have|had)\b)[A-Za-z]+\b){0,3}[\s$)*]*")
VAGUE = "unclear"  # the value of a bound, or of one of several answers
MAX_TOKENS = 400  # of a sentence
MAX_VALUE = 2000  # characters; what is longer is no answer
LINE_OF_NUMBER = r"[ ]*(?:[-*·][ ]+|\(?\d{1,2}[.)][ ]+)?[-+]?[$€£]{0,2}\d[\d,./]*%?\$?[ ]*[,;.]?[ ]*"
LINES_OF_NUMBERS = re.compile(rf"^{LINE_OF_NUMBER}(?:\n{LINE_OF_NUMBER})+$", re.MULTILINE)
BULLET = re.compile(r"^[ ]*(?:[-*·][ ]+|\(?\d{1,2}[.)][ ]+)|[ ,;.]+$", re.MULTILINE)


def final_answer(response: str) -> Statement:
    """What a response states as its answer."""
    text = tidy(visible(response))
    # Lines that hold a number each are one list.
    text = LINES_OF_NUMBERS.sub(lambda lines: ", ".join(BULLET.sub("", lines[0]).split("\n")), text)
    stated = Reader(HeldText(text)).statement()
    if len(stated.value) > MAX_VALUE:
        return Statement("", "", True)
    if stated.value or not IN_WORDS.search(text):
        return stated
    in_numbers = Reader(HeldText(IN_WORDS.sub(number_in_words, text))).statement()
    return Statement(in_numbers.value, stated.words, in_numbers.marked) if in_numbers.marked >= stated.marked else stated


LONE = re.compile(r"one|zero|(?:an? )?(?:half|third|quarter|fourth|fifth|sixth|eighth|tenth)", re.IGNORECASE)


def number_in_words(match: re.Match) -> str:
    """A number in words as digits; "one" only where it must be a number."""
    before, behind = match.string[max(0, match.start() - 20) : match.start()], match.string[match.end() : match.end() + 20]
    sure = (not before.strip() and match.start() < 20) or re.search(r"(?:\b(?:is|are|be)|[:=])\s+$", before)
    lone = LONE.fullmatch(match[0]) and (not sure or re.match(r"\s+(?:of|who|that|which)\b", behind))
    return match[0] if lone else in_digits(match[0])


class Reader:
    """Finds the statement in a held text."""

    def __init__(self, held: HeldText):
        self.held, self.text = held, held.text
        self.tokens = Tokens(held.text)

    def statement(self) -> Statement:
        marks = list(MARK.finditer(self.text))
        first_mark = next((mark.start() for mark in marks if mark.lastgroup != "fix"), len(self.text))
        denied = False
        for mark in reversed(marks):
            if mark.lastgroup != "fix" or mark.start() > first_mark:  # a correction needs something to correct
                stated = self.at_box(mark, first=first_mark == mark.start()) if mark.lastgroup == "box" else self.at(mark)
                if isinstance(stated, Statement):
                    return stated
                denied |= stated == "denied"
        return Statement("", "", True) if denied else self.unmarked()

    def at_box(self, mark: re.Match, *, first: bool) -> Statement | str:
        """The statement of a box; "denied" if the text says that it is wrong, "" if it is empty."""
        before = re.split(r"[.!?\n]\s", self.text[max(0, mark.start() - 60) : mark.start()])[-1]
        if NOT.search(before) or ONCE.search(before) or IS_WRONG.match(self.text, mark.end()):
            return "denied"
        content = self.held.pieces[mark[0]]
        if OR_ELSE.search(before) and not first:
            content = VAGUE
        if content == CUT:
            return Statement("", "", True)
        return Statement(boxed_value(content), content, True) if content else ""

    def at(self, mark: re.Match) -> Statement | str:
        """The statement behind a mark; "denied" if it only says what the answer is not, "" if it states nothing."""
        kinds, kind = self.tokens.kinds, mark.lastgroup
        first = bisect.bisect_left(self.tokens.starts, mark.end())
        while first < len(kinds) and kinds[first] == "E":
            first += 1
        beyond = min(len(kinds), first + MAX_TOKENS)
        last = next((n for n in range(first, beyond) if kinds[n] in "EB"), beyond)
        if first >= len(kinds):
            return ""
        start, end = self.tokens.starts[first], self.tokens.ends[last - 1] if last > first else self.tokens.starts[first]
        found = self.tokens.runs(first, last, STATED_RUN)
        sound = [run for run in found if run.state != "denied"]
        if not found:
            return self.words_at(kind, self.text[start:end], end)
        if not sound:
            return "denied" if kind in ("says", "label") else ""
        if self.is_next(start, found, sound[0]):
            return self.value(sound[0], start, end) if kind not in ("label", "fix") or self.ends(sound[0], end) else ""
        if kind == "says":  # the answer is the sum of 3 and 4, which is 7
            reason = REASON.search(self.text, start, end)
            ahead = [run for run in sound if reason is None or run.start < reason.start()]
            return self.value(ahead[-1], start, end) if ahead else ""
        return ""

    def is_next(self, start: int, found: list[Run], run: Run) -> bool:
        """Whether only fillers, and values that are denied, stand between `start` and a value."""
        between = []
        for denied in found[: found.index(run)]:
            between.append(self.text[start : denied.start])
            start = denied.end
        return all(FILLER.fullmatch(part) for part in [*between, self.text[start : run.start]])

    def ends(self, run: Run, end: int) -> bool:
        """Whether the sentence says nothing more behind a value than its unit, or gives a reason."""
        rest = self.text[run.end : end]
        unit = UNIT_WORDS.match(REASON.split(rest)[0])
        assert unit is not None
        return rest[unit.end() :][:1] in ("", ",", ";", "(", ":", '"', "'", "-") or REASON.match(rest.strip()) is not None

    def words_at(self, kind: str | None, sentence: str, end: int) -> Statement | str:
        """A statement in words."""
        words = re.split(r"[,;]|\bbecause\b|\bsince\b|</answer>", sentence)[0].strip(" .*:\"'")
        too_long = kind == "label" and len(words.split()) > 6
        heading = kind == "hash" and self.text[end:].strip(" .*\n")
        return "" if not words or kind == "fix" or too_long or heading else Statement("", self.held.restore(words), True)

    def value(self, run: Run, start: int, end: int) -> Statement:
        text = self.held.restore(self.text[run.start : run.end])
        vague = run.state == "vague" or ALSO.search(self.text, run.end)
        return Statement(VAGUE if vague else last_step(trim(text)), self.held.restore(self.text[start:end]), True)

    def is_aside(self, before: Run, last: Run) -> bool:
        """Whether the last value stands in brackets behind another of its line: She makes $18 a day (7 days a week)."""
        between = self.text[before.end : last.start + 1]
        opened = between.rfind("(") > max(between.rfind(")"), between.rfind("\n"))
        return opened and not before.state and bool(re.match(r"[^()\n]*\)\W*$", self.text[last.end :]))

    def unmarked(self) -> Statement:
        """Without a mark: the whole text if it is mathematics alone, else its last value."""
        whole = self.held.restore(self.text).strip()
        lead = LEAD.match(whole)
        words = whole[lead.end() :] if lead else whole
        if "\n" not in whole and not has_prose(whole):
            return Statement(last_step(trim(whole)), words, False)
        found = [run for run in self.tokens.runs(0, len(self.tokens.kinds), RUN) if run.state != "denied"]
        if len(found) > 1 and self.is_aside(found[-2], found[-1]):
            found.pop()
        if found:
            begin = max(self.text.rfind("\n", 0, found[-1].start), self.text.rfind(". ", 0, found[-1].start))
            because = BECAUSE.search(self.text, begin + 1, found[-1].start)
            before = [run for run in found if because and begin < run.start < because.start()]
            return Statement(self.value((before or found)[-1], 0, 0).value, words, False)
        return Statement("", words, False)


BOX_LABEL = re.compile(r"(?:\\(?:text|math)[a-z]*\s*\{\s*\([A-J]\)[\s~]*\}|\([A-J]\)(?=[\s\\~]))[\s\\~,:]*(?=\S)")
BOX_TEXT = re.compile(r"\\text[a-z]*\s*\{([^{}]*)\}")


def boxed_value(content: str) -> str:
    """What a box holds, without the letter of a choice; of a sentence in a box its one value."""
    content = BOX_LABEL.sub("", content, count=1) if BOX_LABEL.match(content) else content
    plain = BOX_TEXT.sub(r" \1 ", content)
    if plain == content or not re.match(r"\s*[A-Za-z]{2,}", plain):
        return content
    held = HeldText(plain)
    tokens = Tokens(held.text)
    found = tokens.runs(0, len(tokens.kinds), STATED_RUN)
    return held.restore(held.text[found[0].start : found[0].end]) if [run.state for run in found] == [""] else content
