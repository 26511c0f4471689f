"""The scorer `judge`: a language model behind a server with the OpenAI API rates responses, or compares those to one prompt."""

import importlib.util
import math
import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlparse

from evolve_ray.config import options
from evolve_ray.config.option import option
from evolve_ray.errors import ResourceError, UserError, first_line
from evolve_ray.refine.template import fill
from evolve_ray.store.rows import derive_seed
from evolve_ray.store.turns import as_text

RETRIES, TIMEOUT_S = 5, 600.0  # of the OpenAI client, with growing pauses
RATING = """Rate the response to the question on a scale from {low} to {high}, where {high} is best.

Question:
{prompt}

Response:
{response}

Explain in a few words, then end with: Rating: <number>"""
COMPARISON = """Which response to the question is better?

Question:
{prompt}

Response A:
{response}

Response B:
{other}

Explain in a few words, then end with: Verdict: A, Verdict: B or Verdict: tie"""
RATED = re.compile(r"Rating:\s*\**\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
COMPARED = re.compile(r"Verdict:\s*\**\s*(A|B|tie)\b", re.IGNORECASE)
WINS = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class JudgeArgs:
    """Options of the judge, `[scorer.args]`."""

    model: str = option("name of the model at the server")
    url: str = option("base URL of the server, for example http://127.0.0.1:8000/v1")
    key_env: str = option("environment variable of the scoring actors with the API key; empty: no key is sent", "")
    mode: str = option("`rate`: each response alone; `compare`: all responses to a prompt, two by two and in both orders", "rate",
                       choices=("rate", "compare"))  # fmt: skip
    rubric: str = option("file with the question to the judge, with {prompt} and {response}, to compare also {other}", "")
    votes: int = option("for `rate`: replies for each response; the score is their mean", 1, low=1)
    low: float = option("for `rate`: the worst rating", 1.0)
    high: float = option("for `rate`: the best rating", 10.0)
    temperature: float = option("sampling temperature of the judge", 0.0, low=0.0)
    max_tokens: int = option("longest reply of the judge", 512, unit="tokens", low=1)
    concurrency: int = option("requests at a time", 8, low=1)


class Judge:
    """Scores by a judge. A reply that cannot be read is no vote; a response without a vote has no score (NaN)."""

    def __init__(self, scorer: options.Scorer, args: JudgeArgs):
        self.args = args
        address = urlparse(args.url)
        if address.scheme not in ("http", "https") or not address.netloc or "@" in address.netloc:
            raise UserError(
                f"scorer.args.url: {args.url!r} is not an http address without a password; give the server's base URL"
            )
        if importlib.util.find_spec("openai") is None:
            raise UserError("scorer.name: 'judge' needs the package openai, which is installed with vLLM")
        if args.low >= args.high:
            raise UserError(f"scorer.args.low: is {args.low:g}, but must be below scorer.args.high ({args.high:g})")
        self.rubric = read_rubric(args)

    @cached_property
    def client(self) -> Any:
        import openai

        key = os.environ.get(self.args.key_env, "") if self.args.key_env else "none"
        if not key:
            raise UserError(f"scorer.args.key_env: {self.args.key_env} is not set in the environment of the scoring actors")
        return openai.OpenAI(base_url=self.args.url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT_S)

    def __call__(self, prompts: list[Any], answers: list[str | None], responses: list[str]) -> list[float]:
        prompts = [as_text(prompt) for prompt in prompts]
        with ThreadPoolExecutor(self.args.concurrency) as pool:
            return self.compare(pool, prompts, responses) if self.args.mode == "compare" else self.rate(pool, prompts, responses)

    def rate(self, pool: ThreadPoolExecutor, prompts: list[str], responses: list[str]) -> list[float]:
        """The mean of the votes on each response."""
        votes = range(self.args.votes)
        asks = [(prompt, response, "", vote) for prompt, response in zip(prompts, responses, strict=True) for vote in votes]
        ratings = [self.read_rating(reply) for reply in pool.map(self.ask, asks)]
        size = len(votes)
        return [mean(ratings[first : first + size]) for first in range(0, len(ratings), size)]

    def compare(self, pool: ThreadPoolExecutor, prompts: list[str], responses: list[str]) -> list[float]:
        """The share of wins of each response against the others to its prompt; a tie is half a win.

        Two responses count only if both orders can be read, so that a judge who prefers a position prefers neither.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[prompt].append(row)
        pairs = [(a, b) for rows in groups.values() for place, a in enumerate(rows) for b in rows[place + 1 :]]
        asks = [(prompts[a], responses[i], responses[j], 0) for a, b in pairs for i, j in ((a, b), (b, a))]
        wins = [read_verdict(reply) for reply in pool.map(self.ask, asks)]
        shares: dict[int, list[float]] = defaultdict(list)
        for (a, b), first, second in zip(pairs, wins[::2], wins[1::2], strict=True):
            share = (first + 1 - second) / 2
            shares[a].append(share)
            shares[b].append(1 - share)
        return [mean(shares[row]) for row in range(len(prompts))]

    def ask(self, question: tuple[str, str, str, int]) -> str:
        """The judge's reply to one question (prompt, response, other response, number of the vote)."""
        import openai

        prompt, response, other, vote = question
        scale = {"low": f"{self.args.low:g}", "high": f"{self.args.high:g}"}
        text = fill(self.rubric, prompt=prompt, response=response, other=other, **scale)
        try:
            completion = self.client.chat.completions.create(
                model=self.args.model, messages=[{"role": "user", "content": text}], temperature=self.args.temperature,
                max_tokens=self.args.max_tokens, seed=derive_seed("judge", prompt, response, other, vote),
            )  # fmt: skip
        except openai.OpenAIError as error:
            raise ResourceError(
                f"scorer 'judge': the request to {self.args.url} failed: {first_line(error).rstrip('.')}; start or repair the "
                "server, then submit the same command again"
            ) from None
        return (completion.choices[0].message.content or "") if completion.choices else ""

    def read_rating(self, reply: str) -> float:
        """The last rating in a reply; NaN if there is none, or it is not on the scale."""
        found = RATED.findall(reply)
        rating = float(found[-1]) if found else math.nan
        return rating if self.args.low <= rating <= self.args.high else math.nan


def read_verdict(reply: str) -> float:
    """1.0 if response A wins, 0.0 if B does, 0.5 for a tie; NaN if the reply does not say."""
    found = COMPARED.findall(reply)
    return WINS[found[-1].lower()] if found else math.nan


def mean(values: list[float]) -> float:
    """The mean of the values that are numbers; NaN if none is."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def read_rubric(args: JudgeArgs) -> str:
    """The question to the judge. Raises UserError if its file lacks a field."""
    compares = args.mode == "compare"
    if not args.rubric:
        return COMPARISON if compares else RATING
    try:
        with open(args.rubric, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"scorer.args.rubric: {args.rubric}: cannot be read: {first_line(error)}") from None
    for field in ("prompt", "response", *(("other",) if compares else ())):
        if "{" + field + "}" not in text:
            raise UserError(f"scorer.args.rubric: {args.rubric}: has no field {{{field}}}; add it")
    return text
