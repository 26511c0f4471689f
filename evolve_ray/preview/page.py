"""The preview as one HTML page that loads nothing and runs nothing."""

from typing import Any

from evolve_ray.preview import text
from evolve_ray.report.markup import details, document, escape, section, table

STYLE = """
.tokens{white-space:pre-wrap}
.tokens span{border-radius:.2rem}
.tokens .even{background:color-mix(in srgb,var(--line) 35%,transparent)}
.tokens .special{color:var(--wrong);font-weight:600}
.tokens .trained{background:color-mix(in srgb,var(--right) 30%,transparent)}
.tokens .trained.even{background:color-mix(in srgb,var(--right) 16%,transparent)}
.tokens .end{outline:2px solid var(--wrong)}
"""


def page(content: dict[str, Any]) -> str:
    """The whole page."""
    parts = [
        f"<header><h1>{escape(content['name'])}: preview</h1><p>{escape(content['model'])}</p></header>",
        lines(text.data(content).splitlines()[1]),
        section("warnings", "Warnings", "" if content["warnings"] else "None.", bullets(content["warnings"]) or " "),
        section("faults", "What cannot be used", "", bullets(content["faults"])),
        section("data", "Data", "What each table was taken for, and the rows that are not used.", data(content)),
        section("rounds", "What the model is asked", ROUNDS, "".join(prompt(part) for part in content["prompts"])),
        section("lengths", "Lengths", f"With every response of sampling.max_tokens = {content['max_tokens']}.", lengths(content)),
        section("pairs", "What is trained", PAIRS, "".join(pair(part) for part in content["pairs"])),
        section("verifier", "Verifier", "", lines(text.verifier(content).removeprefix("== "))),
        section("scorer", "Scorer", "", scorer(content)),
    ]
    return document(f"{content['name']}: preview", "".join(parts), STYLE)


ROUNDS = (
    "The first prompts of iteration 1, in each round, as the model reads them. Every token has a background of its own; special "
    "tokens are coloured, and pointing at a token shows its id. A response is a placeholder."
)
PAIRS = "Trained tokens are coloured; all others are context. The end token has a frame."


def bullets(items: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


def lines(value: str) -> str:
    return f"<p>{escape(value)}</p>" if value else ""


def data(content: dict[str, Any]) -> str:
    parts = [
        table(
            ["table", "file or dataset", "rows", "taken for"],
            [[part["table"], part["path"], f"{part['num_rows']:,}", part["taken_for"]] for part in content["tables"]],
        )
    ]
    dropped = [
        [part["table"], f"{entry['count']:,}", entry["reason"], entry["first"]]
        for part in content["tables"]
        for entry in part["dropped"]
    ]
    return "".join([*parts, "<h3>Dropped rows</h3>" + table(["table", "rows", "reason", "first"], dropped) if dropped else ""])


def tokens(part: dict[str, Any], *, trained: bool = False, end: bool = False) -> str:
    """Tokens as spans, one background in turns with another; the last one is framed if it is the `end` token."""
    special, last = set(part["special"]), len(part["pieces"]) - 1
    spans = []
    for place, (piece, number) in enumerate(zip(part["pieces"], part["ids"], strict=True)):
        names = ["even"] * (place % 2 == 0) + ["special"] * (place in special) + ["trained"] * trained
        names += ["end"] * (end and place == last)
        spans.append(f'<span class="{" ".join(names)}" title="{number}">{escape(piece)}</span>')
    return "".join(spans)


def prompt(part: dict[str, Any]) -> str:
    asks = []
    for ask in part["asks"]:
        kind = "" if ask["kind"] == "answer" else f" ({ask['kind']})"
        kind += f" to {ask['model']}" if "model" in ask else ""
        times = f", {ask['count']} times" if ask["count"] > 1 else ""
        label = f"round {ask['round']}{kind}{times}: {ask['num_tokens']} tokens"
        ids = details("ids", f"<pre>{escape(' '.join(map(str, ask['ids'])))}</pre>")
        asks.append(f'<p class="label">{escape(label)}</p><pre class="tokens" dir="auto">{tokens(ask)}</pre>{ids}')
    answer = (
        f'<p class="label">gold answer</p><pre dir="auto">{escape(part["answer"])}</pre>' if part["answer"] is not None else ""
    )
    return f"<h3>{escape(part['place'])}</h3>{answer}{''.join(asks)}"


def lengths(content: dict[str, Any]) -> str:
    if not content["lengths"]:
        return ""
    header = ["round", "kind", "responses in view", "ask, median", "ask, longest", "with response", "of the context"]
    names = ("kind", "responses_in_view", "median_ask", "longest_ask", "longest_whole")
    rows = [
        [part["round"], *(part[name] for name in names), f"{100 * part['share_of_context']:.0f} %"] for part in content["lengths"]
    ]
    return table(header, rows) + "".join(lines(line) for line in text.triple_lines(content))


def pair(part: dict[str, Any]) -> str:
    inside = []
    for sequence in part["sequences"]:
        context, trained = sequence["context"], sequence["trained"]
        end = f"ends with {sequence['end_token']}" if sequence["end_token"] else "no end token"
        label = f"{sequence['name']}: {context['num_tokens']} tokens of context, {trained['num_tokens']} trained, {end}"
        shown = tokens(context) + tokens(trained, trained=True, end=sequence["end_token"] is not None)
        inside.append(f'<p class="label">{escape(label)}</p><pre class="tokens" dir="auto">{shown}</pre>')
    return f"<h3>{escape(part['training'])}: {escape(part['objective'])}, pair from {escape(part['from'])}</h3>{''.join(inside)}"


def scorer(content: dict[str, Any]) -> str:
    if not content["scorer"]:
        return ""
    rows = [
        [text.cut(row["prompt"], 70), f"{row['scores']['chosen']:.4g}", f"{row['scores']['rejected']:.4g}"]
        for row in content["scorer"]
    ]
    return table(["prompt", "chosen", "rejected"], rows)
