"""Scorers: a reward model, checkable answers, and the mean or minimum of several. They know no Ray and no files of a run."""

import collections
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import numbers
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

from evolve_ray.config import options as config
from evolve_ray.config.plugs import find_plug
from evolve_ray.errors import IntegrityError, ResourceError, UserError
from evolve_ray.models.chat import Chat


class Scorer(Protocol):
    """A batch of (prompt, answer, response) -> one number each; higher is better. NaN: no number can be given."""

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]: ...


class RewardModel:
    """A Hugging Face sequence classifier with one output; its raw logit is the score, with no softmax or sigmoid.

    The conversation `[user: prompt, assistant: response]` is rendered by the reward model's own chat template, whole: it ends
    as a finished turn also where the answer was cut by length, since a reward model has seen nothing else. That it was cut is
    for the selection to weigh, which chooses no such answer unless it is told to. Rows are scored in fixed batches in their
    given order, so a score does not depend on how many actors there are.
    """

    def __init__(self, options: config.Scorer, folder: str, field: str = "scorer.model"):
        import torch
        from transformers import AutoModelForSequenceClassification

        self.torch = torch
        self.batch_size, self.max_tokens = options.batch_size, options.max_tokens
        self.chat = Chat(folder, field)
        self.device = torch.device("cuda" if options.gpus_per_actor else "cpu")
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=getattr(torch, options.dtype), trust_remote_code=False
        )
        self.model = model.to(self.device).eval()

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        scores: list[float] = []
        ids = [
            self.chat.context_ids(({"role": "user", "content": p}, {"role": "assistant", "content": r}), generate=False)
            for p, r in zip(prompts, responses, strict=True)
        ]
        for first in range(0, len(ids), self.batch_size):
            batch = ids[first : first + self.batch_size]
            # An answer too long for the reward model is not cut and scored: it gets no number, which rejects the row.
            fits = [row for row in batch if len(row) <= self.max_tokens]
            with self.torch.inference_mode():
                values = iter(classify(self.model, fits, self.device).tolist() if fits else [])
            scores += [next(values) if len(row) <= self.max_tokens else math.nan for row in batch]
        return scores


def classify(model: Any, ids: list[list[int]], device: Any) -> Any:
    """The raw logit of a sequence classifier for each row of token ids: a float32 tensor `B`, with gradients where they are on.

    Scoring with a reward model and training one share this forward; `model` may be wrapped in a DeepSpeed engine.
    """
    import torch

    settings = getattr(model, "module", model).config
    own_pad, last = settings.pad_token_id, {row[-1] for row in ids}
    # The classifier reads the last token that is not padding: without a token for it, pad with one that ends none of these rows.
    pad = next(token for token in itertools.count() if token not in last) if own_pad is None else own_pad
    ids_BT = torch.full((len(ids), max(map(len, ids))), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, tokens in enumerate(ids):  # padded on the right
        ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        mask_BT[row, : len(tokens)] = 1
    settings.pad_token_id = pad
    try:
        logits_BK = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)).logits
    finally:
        settings.pad_token_id = own_pad
    return logits_BK[:, 0].float()


class ExactMatch:
    """1.0 if the response equals the answer, surrounding white space apart, else 0.0."""

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [float(a is not None and r.strip() == a.strip()) for a, r in zip(answers, responses, strict=True)]


class RegexMatch:
    """1.0 if the last match of `pattern` in the response (its first group, if it has one) equals the answer, else 0.0."""

    def __init__(self, verifier: config.Verifier):
        if not verifier.pattern:
            raise UserError(r"verifier.pattern: must be set when verifier.name is 'regex', for example '####\s*(.+)'")
        try:
            self.pattern = re.compile(verifier.pattern)
        except re.error as error:
            raise UserError(f"verifier.pattern: {verifier.pattern!r} is not a regular expression: {error}") from None

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [float(a is not None and self._found(r) == a.strip()) for a, r in zip(answers, responses, strict=True)]

    def _found(self, response: str) -> str | None:
        found = None
        for match in self.pattern.finditer(response):
            found = match[1 if self.pattern.groups else 0]
        return None if found is None else found.strip()


# A sign is one only where it cannot be a minus between two terms; digits inside a word ("x2", "v1.2.3") are no number.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}%])[-+])?[$€£¥]?(?<![\w.])"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d+)?(?:/(?P<below>\d+))?"
)


class NumericMatch:
    """1.0 if the last number of the response is the last number of the answer, within the relative tolerance, else 0.0.

    Numbers are in English notation (`-1,234.5`, `1e-3`); `3/4` is a fraction; a percent sign or a unit is not read. NaN where
    the answer has no number: that is a fault of the data, not of the response.
    """

    def __init__(self, verifier: config.Verifier):
        self.tolerance = verifier.tolerance

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [self._judge(last_number(a or ""), last_number(r)) for a, r in zip(answers, responses, strict=True)]

    def _judge(self, truth: float, found: float) -> float:
        return float(math.isclose(truth, found, rel_tol=self.tolerance)) if math.isfinite(truth) else math.nan


def last_number(text: str) -> float:
    """NaN if there is none."""
    match = None
    for match in NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):  # noqa: B007 (the last one is what counts)
        pass
    if match is None:
        return math.nan
    sign, digits, exponent, below = match.group("sign", "digits", "exponent", "below")
    value = float((sign or "") + digits.replace(",", "") + (exponent or ""))
    if below is None:
        return value
    return value / float(below) if float(below) else math.nan


class MathMatch:
    """1.0 if math-verify finds the response mathematically equal to the answer, else 0.0.

    NaN where the answer cannot be parsed: that is a fault of the data. A text of nothing but mathematics is read as LaTeX
    whether or not it stands between dollar signs; out of any other, math-verify takes the final expression.

    SymPy evaluates what it reads, and `2^{2^{100}}` never ends. The library's own timeouts need the main thread and do not
    interrupt a long multiplication, so a child process judges, and is ended after `CPU_SECONDS` on one response: 0.0.
    """

    CPU_SECONDS = 5.0  # of the child's own time, so that a busy machine changes no verdict
    MEMORY_BYTES = 4 << 30

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("verifier.name: 'math' needs the package math-verify; pip install -e '.[eval]'")
        self._child: Any = None

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [self._judge(a or "", r) for a, r in zip(answers, responses, strict=True)]

    def _judge(self, answer: str, response: str) -> float:
        if self._child is None:
            code = f"from evolve_ray.scorers import serve_math; serve_math({self.CPU_SECONDS}, {self.MEMORY_BYTES})"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            command = [sys.executable, "-c", code]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        with contextlib.suppress(BrokenPipeError):  # it ended: the empty line below says so
            self._child.stdin.write(json.dumps([answer, response]) + "\n")
            self._child.stdin.flush()
        # A first line when the answer was parsed, then the verdict; an empty one from a child that ended over it.
        for unfinished in (math.nan, 0.0):
            line = self._child.stdout.readline()
            if not line:
                self._bury()
                return unfinished
            if line != "parsed\n":
                break
        return float(line)

    def _bury(self) -> None:
        code = self._child.wait()
        self._child = None
        if code >= 0:
            raise ResourceError(f"verifier 'math': its process ended with exit code {code}; see the scorer's log for its error")


def serve_math(cpu_seconds: float, memory_bytes: int) -> None:
    """The child process of `MathMatch`: lines of JSON [answer, response] in; "parsed" and a verdict, or "nan", out."""
    import logging
    import resource

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # the library warns that its timeouts are off
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    def read(text: str) -> list:
        text = THOUSANDS.sub("", text.replace("\N{MINUS SIGN}", "-").replace(r"\$", "")).strip()  # \$ is money, no delimiter
        shapes = [text] if DELIMITED.search(text) else [f"${text}$", text]
        if WORD.search(COMMAND.sub(" ", text)):
            shapes.reverse()
        found = (parse(shape, parsing_timeout=None, fallback_mode="no_fallback") for shape in shapes)
        return next(filter(None, found), [])

    read_answer = functools.lru_cache(maxsize=64)(read)
    for line in sys.stdin:
        answer, response = json.loads(line)
        # Nobody handles its signal, so it ends the process wherever that is.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        truth = read_answer(answer)
        print("parsed" if truth else "nan", flush=True)
        if truth:
            print(float(verify(truth, read(response), timeout_seconds=None)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


THOUSANDS = re.compile(r"(?<=\d)\{,\}(?=\d{3}(?!\d))")  # LaTeX's comma in 70{,}000: out of an equation it would make a set
DELIMITED = re.compile(r"\$|\\boxed|(?<!\\)\\[(\[]")
COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[A-Za-z ]*\})?")  # with an argument of words, as in \text{ cm}
WORD = re.compile(r"(?<!\S)(?!(?:and|or)\b)[A-Za-z]{2,}[.,:;!?]?(?!\S)")


VERIFIERS: dict[str, Callable[[config.Verifier], Scorer]] = {
    "exact": lambda _: ExactMatch(),
    "regex": RegexMatch,
    "numeric": NumericMatch,
    "math": lambda _: MathMatch(),
}


def build_verifier(verifier: config.Verifier) -> Scorer:
    """A shipped verifier with its options; one of `module:Name` is made without arguments."""
    if verifier.name in VERIFIERS:
        return VERIFIERS[verifier.name](verifier)
    return find_plug({}, verifier.name, "verifier.name")()


def same_answer(options: config.Verifier | None) -> Callable[[str, str], bool]:
    """Whether two responses give the same answer as the verifier reads them; without a shipped one: the same text.

    Surrounding white space apart. Responses in which it reads no answer agree only if their texts do.
    """
    name = options.name if options else "exact"
    judge: Callable[[str, str], bool] = lambda one, other: False  # noqa: E731
    if options and name == "regex":
        found = RegexMatch(options)._found
        judge = lambda one, other: found(one) is not None and found(one) == found(other)  # noqa: E731
    if options and name == "numeric":
        judge = lambda one, other: math.isclose(last_number(one), last_number(other), rel_tol=options.tolerance)  # noqa: E731
    if name == "math":
        verifier = MathMatch()
        judge = lambda one, other: verifier._judge(one, other) == 1.0  # noqa: E731
    return lambda one, other: one.strip() == other.strip() or judge(one, other)


class Combined:
    """The mean or the minimum of several scorers, response by response; NaN where any of them gives no finite number."""

    def __init__(self, members: dict[str, Scorer], combine: Callable[[list[float]], float]):
        self.members, self.combine = members, combine

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        columns = [checked(f"scorer member {name}", member, prompts, answers, responses) for name, member in self.members.items()]
        return [self.combine(list(row)) if all(map(is_finite, row)) else math.nan for row in zip(*columns, strict=True)]


COMBINATIONS: dict[str, Callable[[list[float]], float]] = {"mean": lambda values: sum(values) / len(values), "minimum": min}


def reward_model_names(options: config.Scorer) -> list[str]:
    """The reward models that a recipe's scorer hosts, by the names that the recipe gives them."""
    if options.name == "reward_model":
        return [options.model]
    return [member.removeprefix(REWARD_MODEL) for member in options.members if member.startswith(REWARD_MODEL)]


def reward_model_field(options: config.Scorer) -> str:
    """The option that names them."""
    return "scorer.members" if options.members else "scorer.model"


REWARD_MODEL = "reward_model="  # a member of this form is a reward model


def build_scorer(options: config.Scorer, reward_models: dict[str, str], verifier: Scorer | None) -> Scorer:
    """The scorer of a recipe. `reward_models`: its reward models' names -> local folders; `verifier`: the recipe's own."""
    if options.name == "reward_model":
        return RewardModel(options, reward_models[options.model])
    if options.name in COMBINATIONS:
        for member, count in collections.Counter(options.members).items():
            if count > 1:
                raise UserError(f"scorer.members: {member!r} stands there {count} times; name each scorer once")
        members = {member: build_member(member, options, reward_models, verifier) for member in options.members}
        return Combined(members, COMBINATIONS[options.name])
    return build_member(options.name, options, reward_models, verifier)


def build_member(member: str, options: config.Scorer, reward_models: dict[str, str], verifier: Scorer | None) -> Scorer:
    if member == "verifier":
        if verifier is None:
            raise UserError("verifier: must be set when the verifier is the scorer; add a [verifier] table")
        return verifier
    if member.startswith(REWARD_MODEL):
        return RewardModel(options, reward_models[member.removeprefix(REWARD_MODEL)], "scorer.members")
    return find_plug({}, member, "scorer.members" if options.members else "scorer.name")()


def checked(name: str, scorer: Scorer, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
    """What a scorer gives, one value for each response; whether they are finite is for the caller to see."""
    values = list(scorer(prompts, answers, responses))
    if len(values) != len(responses):
        raise IntegrityError(
            f"{name}: gave {len(values)} values for {len(responses)} responses, so nobody can tell whose they are; it must give "
            "one for each: mend it, then submit the same command again"
        )
    return values


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and math.isfinite(value)
