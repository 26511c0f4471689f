"""The preview as text for the terminal."""

from typing import Any

from evolve_ray.report.markup import clean
from evolve_ray.report.tables import aligned

CUT = 1200  # characters of one text
IDS = 24  # ids of one text


def text(content: dict[str, Any]) -> str:
    """All parts of a preview, the warnings last."""
    parts = [data(content), prompts(content), lengths(content), pairs(content), verifier(content), scorer(content)]
    parts += [listed("cannot be used", content["faults"]), listed("warnings", content["warnings"], "none")]
    return "\n\n".join(filter(None, parts))


def data(content: dict[str, Any]) -> str:
    template = content["template"]
    lines = [f"{content['name']}: {content['model']}", f"template {template['name']} ({template['layout']}), strategy "
             f"{content['strategy']}, thinking: {content['thinking']}", ""]  # fmt: skip
    for table in content["tables"]:
        lines.append(f"{table['table']}: {table['num_rows']:,} rows of {table['path']}: {table['taken_for']}")
        lines += [f"  dropped {part['count']:,}: {part['reason']} (first: {part['first']})" for part in table["dropped"]]
    return "\n".join(lines)


def prompts(content: dict[str, Any]) -> str:
    lines = []
    for prompt in content["prompts"]:
        lines += [f"== prompt {prompt['prompt_id']}, {prompt['place']}"]
        lines += [f"gold answer: {cut(prompt['answer'])}"] if prompt["answer"] is not None else []
        for ask in prompt["asks"]:
            times = f", {ask['count']} times" if ask["count"] > 1 else ""
            kind = "" if ask["kind"] == "answer" else f" ({ask['kind']})"
            kind += f" to {ask['model']}" if "model" in ask else ""
            lines += [f"-- round {ask['round']}{kind}{times}: {ask['num_tokens']} tokens", cut(ask["text"]), ids(ask["ids"])]
    return "\n".join(lines)


def lengths(content: dict[str, Any]) -> str:
    if not content["lengths"]:
        return ""
    header = ["round", "responses in view", "ask, median", "ask, longest", "with response", "of the context"]
    lines = [
        [
            f"{part['round']}" if part["kind"] == "answer" else f"{part['round']} ({part['kind']})",
            str(part["responses_in_view"]),
            *(str(part[name]) for name in ("median_ask", "longest_ask", "longest_whole")),
            f"{100 * part['share_of_context']:.0f} %",
        ]
        for part in content["lengths"]
    ]
    title = f"== tokens, with every response of sampling.max_tokens = {content['max_tokens']}"
    return "\n".join([title, *aligned(header, lines), *triple_lines(content)])


def triple_lines(content: dict[str, Any]) -> list[str]:
    return [
        f"{name}: answers of {part['answer_median']} (median) to {part['answer_max']} tokens, whole sequences of "
        f"{part['sequence_median']} to {part['sequence_max']}, in the first {part['num_measured']:,} triples"
        for name, part in content["triples"].items()
    ]


def pairs(content: dict[str, Any]) -> str:
    lines = []
    for pair in content["pairs"]:
        lines.append(f"== {pair['training']} ({pair['objective']}), pair from {pair['from']}")
        for part in pair["sequences"]:
            end = f"ends with {part['end_token']}" if part["end_token"] else "no end token"
            context, trained = part["context"], part["trained"]
            lines += [f"-- {part['name']}: {context['num_tokens']} tokens of context, {trained['num_tokens']} trained, {end}"]
            lines += [cut(context["text"]), f">>>{cut(trained['text'])}<<<", ids(trained["ids"])]
    return "\n".join(lines)


def verifier(content: dict[str, Any]) -> str:
    counts = content["verifier"]
    if not counts:
        return ""
    return (
        f"== verifier: {counts['num_gold_right']:,} of {counts['num_checked']:,} gold answers are right by its own measure; "
        f"{counts['num_wrong_right']:,} of {counts['num_wrong']:,} answers of other prompts are taken for right"
        + (f" ({counts['num_answers']:,} answers in all)" if counts["num_checked"] < counts["num_answers"] else "")
    )


def scorer(content: dict[str, Any]) -> str:
    if not content["scorer"]:
        return ""
    lines = ["== scorer"]
    for row in content["scorer"]:
        lines.append(f"chosen {row['scores']['chosen']:.4g}, rejected {row['scores']['rejected']:.4g}: {cut(row['prompt'], 70)}")
    return "\n".join(lines)


def listed(title: str, items: list[str], empty: str = "") -> str:
    if not items:
        return f"== {title}: {empty}" if empty else ""
    return "\n".join([f"== {title}", *(f"* {clean(item)}" for item in items)])


def cut(value: str, limit: int = CUT) -> str:
    """A text without control characters; of a long one the start and the end, with a count of what is missing between them."""
    value = clean(value)
    missing = len(value) - limit
    return value if missing <= 0 else f"{value[: limit // 2]} ... ({missing:,} characters) ... {value[-limit // 2 :]}"


def ids(numbers: list[int]) -> str:
    more = f", ... ({len(numbers) - IDS} more)" if len(numbers) > IDS else ""
    return f"ids {', '.join(map(str, numbers[:IDS]))}{more}"
