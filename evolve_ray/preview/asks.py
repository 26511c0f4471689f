"""What the model is asked in each round, found by running the recipe's strategy with placeholders for the responses."""

import re
from dataclasses import dataclass
from typing import Any

from evolve_ray.config.options import Config
from evolve_ray.config.plugs import blame, find_plug, takes, with_args
from evolve_ray.errors import UserError
from evolve_ray.generate.draft_rows import row_of_prompt
from evolve_ray.generate.requests import line_of
from evolve_ray.preview.tokens import shown
from evolve_ray.refine.asks import Ask, Draft, Given, Judge, LogProb, Made, Messages, Score, Skip, Strategy, Verdict, Verify
from evolve_ray.refine.named_models import unknown_model
from evolve_ray.refine.strategies import ALL_STRATEGIES
from evolve_ray.refine.template import Template

PLACEHOLDER = re.compile(r"\[response \d+ of round \d+\]")


@dataclass(frozen=True)
class Round:
    """How long the asks of one round are: tokens beside those of the first ask and of the responses in view; their number."""

    number: int
    kind: str
    extra_tokens: int
    responses_in_view: int


def run_strategy(config: Config, template: Template, row: dict) -> list[Ask]:
    """All asks of the strategy for a prompt, in their order; every response is a placeholder, and every score is 0."""
    name = config.strategy.name
    start = with_args("strategy.args", name, find_plug(ALL_STRATEGIES, name, "strategy.name"), config.strategy.args)
    asks: list[Ask] = []
    value: Any = None
    more = {"row": row_of_prompt(row)} if takes(start, "row") else {}
    with blame("strategy.name", name):
        strategy: Strategy = start(row["prompt"], template, config.strategy, **more)
    while True:
        with blame("strategy.name", name):
            try:
                request = strategy.send(value)
            except StopIteration:
                return asks
        if isinstance(request, Judge):
            value = [0.0] * len(request.drafts)
        elif isinstance(request, Verify):
            value = Verdict(0.0, "[what the verifier says]")
        elif isinstance(request, Skip | Score):
            value = None
        elif isinstance(request, LogProb):
            value = 0.0
        elif isinstance(request, Made):
            made = request
            value = Draft(f"{made.sample}-{made.round}-made", made.text, made.sample, made.round, made.parent_id, "stop")
        elif isinstance(request, Given):
            value = placeholder(Ask((), 0, 1))
        else:
            batch = request if isinstance(request, list) else [request]
            for ask in batch:
                if unknown := unknown_model(ask.model, config.models):
                    raise UserError(f"strategy.name: {name!r}: {unknown}{line_of(strategy)}")
            asks += batch
            drafts = [placeholder(ask) for ask in batch]
            value = drafts if isinstance(request, list) else drafts[0]


def placeholder(ask: Ask) -> Draft:
    text = f"[response {ask.sample + 1} of round {ask.round}]"
    return Draft(f"{ask.sample}-{ask.round}-{ask.kind}", text, ask.sample, ask.round, ask.parent_id, "stop")


def show_asks(
    config: Config, template: Template, chat: Any, row: dict, others: dict[str, Any] | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """The asks of a prompt as text and ids; asks with the same messages (independent samples) are one entry with a count.

    `others` are the `Chat`s of the models of `[models]`, each of which renders the asks to its model.
    """
    entries: list[dict[str, Any]] = []
    last: tuple[str, Messages] | None = None
    policy = chat
    for ask in run_strategy(config, template, row):
        if last == (ask.model, ask.messages):
            entries[-1]["count"] += 1
            continue
        last = (ask.model, ask.messages)
        entry = {"round": ask.round, "kind": ask.kind, "count": 1, "messages": list(ask.messages)}
        entry |= {"model": ask.model} if ask.model else {}
        chat = (others or {}).get(ask.model, policy)
        prefix = chat.text_ids(ask.prefix) if ask.prefix else []
        entries.append({**entry, **shown(chat, [*chat.context_ids(ask.messages), *prefix])})
    return entries


def round_lengths(config: Config, template: Template, chat: Any, row: dict) -> list[Round]:
    """The lengths of the policy's asks of each round, relative to the first ask of the same prompt."""
    first = len(chat.context_ids(template.direct(row["prompt"])))
    rounds: dict[tuple[int, str], Round] = {}
    for ask in (ask for ask in run_strategy(config, template, row) if not ask.model):
        in_view = sum(len(PLACEHOLDER.findall(message["content"])) for message in ask.messages)
        empty = tuple({**message, "content": PLACEHOLDER.sub("", message["content"])} for message in ask.messages)
        entry = Round(ask.round, ask.kind, len(chat.context_ids(empty)) - first, in_view)
        previous = rounds.get((ask.round, ask.kind), entry)
        rounds[ask.round, ask.kind] = max(previous, entry, key=lambda part: (part.responses_in_view, part.extra_tokens))
    return list(rounds.values())
