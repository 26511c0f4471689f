"""The scorer `judge`: a language model rates responses, or compares those to one prompt.

It answers behind a server with the OpenAI API, or in an engine of its own inside the scoring actor.
"""

import importlib.util
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlparse

from evolve_ray.config import options
from evolve_ray.config.option import option
from evolve_ray.errors import ResourceError, UserError, first_line
from evolve_ray.refine.ratings import RATING, mean, read_rating
from evolve_ray.refine.template import fill
from evolve_ray.score.judge_engine import JudgeEngine, JudgeSpec, Reply
from evolve_ray.store.rows import derive_seed
from evolve_ray.store.turns import as_text

RETRIES, TIMEOUT_S = 5, 600.0  # of the OpenAI client, with growing pauses
COMPARISON = """Which response to the question is better?

Question:
{prompt}

Response A:
{response}

Response B:
{other}

Explain in a few words, then end with: Verdict: A, Verdict: B or Verdict: tie"""
COMPARED = re.compile(r"Verdict:\s*\**\s*(A|B|tie)\b", re.IGNORECASE)
COUNTS = ("num_judge_asks", "num_unparsable", "num_refused", "num_judge_tokens", "num_judge_prompt_tokens")
WINS = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class JudgeArgs:
    """Options of the judge, `[scorer.args]`."""

    model: str = option(
        "name of the model at the server; without a url `policy` (of the iteration), `initial`, or a model's folder or name"
    )
    url: str = option("base URL of a server, for example http://127.0.0.1:8000/v1; empty: an engine in the scoring actor", "")
    engine: dict = option("without a url: arguments for vLLM's `LLM`; empty: those of [engine.args]", {})
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

    def __init__(self, scorer: options.Scorer, args: JudgeArgs, spec: JudgeSpec | None = None):
        self.args, self.spec = args, spec
        self.counts: Counter[str] = Counter()
        address = urlparse(args.url)
        if args.url and (address.scheme not in ("http", "https") or not address.netloc or "@" in address.netloc):
            raise UserError(
                f"scorer.args.url: {args.url!r} is not an http address without a password; give the server's base URL"
            )
        if args.url and args.engine:
            raise UserError("scorer.args.engine: has no effect with scorer.args.url; remove one of them")
        if args.url and importlib.util.find_spec("openai") is None:
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

    @cached_property
    def engine(self) -> JudgeEngine:
        if self.spec is None:
            raise UserError("scorer.args.url: is missing; here the judge must be behind a server")
        return JudgeEngine(self.spec)

    def reload(self, spec: JudgeSpec) -> None:
        """Takes the weights of another model of the same shape, if its engine runs."""
        if "engine" in self.__dict__:
            self.engine.reload(spec)
        self.spec = spec

    def take_counts(self) -> dict[str, int]:
        """What was asked since the last call: questions, replies that cannot be read or were refused, tokens."""
        counts, self.counts = dict(self.counts), Counter()
        return dict.fromkeys(COUNTS, 0) | counts

    def __call__(self, prompts: list[Any], answers: list[str | None], responses: list[str]) -> list[float]:
        prompts = [as_text(prompt) for prompt in prompts]
        return self.compare(prompts, responses) if self.args.mode == "compare" else self.rate(prompts, responses)

    def rate(self, prompts: list[str], responses: list[str]) -> list[float]:
        """The mean of the votes on each response."""
        votes = range(self.args.votes)
        asks = [(prompt, response, "", vote) for prompt, response in zip(prompts, responses, strict=True) for vote in votes]
        ratings = self.read(self.replies(asks), lambda text: read_rating(text, self.args.low, self.args.high))
        size = len(votes)
        return [mean(ratings[first : first + size]) for first in range(0, len(ratings), size)]

    def compare(self, prompts: list[str], responses: list[str]) -> list[float]:
        """The share of wins of each response against the others to its prompt; a tie is half a win.

        Two responses count only if both orders can be read, so that a judge who prefers a position prefers neither.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[prompt].append(row)
        pairs = [(a, b) for rows in groups.values() for place, a in enumerate(rows) for b in rows[place + 1 :]]
        asks = [(prompts[a], responses[i], responses[j], 0) for a, b in pairs for i, j in ((a, b), (b, a))]
        wins = self.read(self.replies(asks), read_verdict)
        shares: dict[int, list[float]] = defaultdict(list)
        for (a, b), first, second in zip(pairs, wins[::2], wins[1::2], strict=True):
            share = (first + 1 - second) / 2
            shares[a].append(share)
            shares[b].append(1 - share)
        return [mean(shares[row]) for row in range(len(prompts))]

    def read(self, replies: list[Reply], read: Callable[[str], float]) -> list[float]:
        """The values of the replies, NaN for one without; counts what was asked, and why a reply is no vote."""
        values = [math.nan if reply.refused else read(reply.text) for reply in replies]
        self.counts["num_judge_asks"] += len(replies)
        for reply, value in zip(replies, values, strict=True):
            self.counts["num_judge_tokens"] += reply.num_tokens
            self.counts["num_judge_prompt_tokens"] += reply.num_prompt_tokens
            self.counts["num_refused"] += reply.refused
            self.counts["num_unparsable"] += not reply.refused and math.isnan(value)
        return values

    def replies(self, asks: list[tuple[str, str, str, int]]) -> list[Reply]:
        """The judge's replies to questions (prompt, response, other response, number of the vote), in their order."""
        scale = {"low": f"{self.args.low:g}", "high": f"{self.args.high:g}"}
        questions = [
            (fill(self.rubric, prompt=ask[0], response=ask[1], other=ask[2], **scale), derive_seed("judge", *ask)) for ask in asks
        ]
        if not self.args.url:
            return self.engine.replies(questions, self.args.temperature, self.args.max_tokens)
        with ThreadPoolExecutor(self.args.concurrency) as pool:
            return list(pool.map(self.ask_server, questions))

    def ask_server(self, question: tuple[str, int]) -> Reply:
        import openai

        text, seed = question
        try:
            completion = self.client.chat.completions.create(
                model=self.args.model, messages=[{"role": "user", "content": text}], temperature=self.args.temperature,
                max_tokens=self.args.max_tokens, seed=seed,
            )  # fmt: skip
        except openai.OpenAIError as error:
            raise ResourceError(
                f"scorer 'judge': the request to {self.args.url} failed: {first_line(error).rstrip('.')}; start or repair the "
                "server, then submit the same command again"
            ) from None
        if not completion.choices:
            return Reply("")
        choice, usage = completion.choices[0], completion.usage
        return Reply(
            choice.message.content or "", usage.completion_tokens if usage else 0, usage.prompt_tokens if usage else 0,
            refused=bool(choice.message.refusal) or choice.finish_reason == "content_filter",
        )  # fmt: skip


def read_verdict(reply: str) -> float:
    """1.0 if response A wins, 0.0 if B does, 0.5 for a tie; NaN if the reply does not say."""
    found = COMPARED.findall(reply)
    return WINS[found[-1].lower()] if found else math.nan


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
