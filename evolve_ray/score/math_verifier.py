"""The verifier `math`: compares mathematical answers with math-verify, in a child process."""

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from typing import Any

from evolve_ray.errors import ResourceError, UserError


class MathMatch:
    """1.0 if the response is mathematically equal to the gold answer, 0.0 if not.

    NaN if the gold answer cannot be parsed: that is a fault of the data. A text that is only mathematics is read as LaTeX, with
    or without dollar signs. From any other text math-verify takes the final expression.

    SymPy evaluates the expressions that it reads, and `2^{2^{100}}` never ends. The timeouts of math-verify need the main thread
    and cannot interrupt a long multiplication. So a child process compares; it is killed after `CPU_SECONDS` on one response,
    and the value is 0.0.
    """

    CPU_SECONDS = 5.0  # CPU time of the child, so that the result does not depend on the load of the machine
    MEMORY_BYTES = 4 << 30

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("verifier.name: 'math' needs the package math-verify; pip install -e '.[eval]'")
        self._child: Any = None

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        return [self.compare(a or "", r) for a, r in zip(answers, responses, strict=True)]

    def compare(self, answer: str, response: str) -> float:
        """The value of one response; starts the child process if there is none."""
        if self._child is None:
            code = f"from evolve_ray.score.math_verifier import serve_math; serve_math({self.CPU_SECONDS}, {self.MEMORY_BYTES})"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            command = [sys.executable, "-c", code]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        with contextlib.suppress(BrokenPipeError):  # the child has ended: `readline` below returns an empty line
            self._child.stdin.write(json.dumps([answer, response]) + "\n")
            self._child.stdin.flush()
        # One line when the answer is parsed, then one with the value; `readline` returns "" if the child has ended.
        for value_if_killed in (math.nan, 0.0):
            line = self._child.stdout.readline()
            if not line:
                self._close_child()
                return value_if_killed
            if line != "parsed\n":
                break
        return float(line)

    def _close_child(self) -> None:
        """Waits for a child that has ended. Raises ResourceError if it was not killed by a signal."""
        code = self._child.wait()
        self._child = None
        if code >= 0:
            raise ResourceError(f"verifier 'math': its process ended with exit code {code}; see the log of the scorer")


def serve_math(cpu_seconds: float, memory_bytes: int) -> None:
    """The child process of `MathMatch`. Reads lines of JSON [answer, response]; prints "parsed" and a value, or "nan"."""
    import logging
    import resource

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # the library warns that its timeouts are off
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    def read(text: str) -> list:
        text = THOUSANDS.sub("", text.replace("\N{MINUS SIGN}", "-").replace(r"\$", "")).strip()  # \$ is money, not a delimiter
        variants = [text] if DELIMITED.search(text) else [f"${text}$", text]
        if WORD.search(COMMAND.sub(" ", text)):
            variants.reverse()
        parsed = (parse(variant, parsing_timeout=None, fallback_mode="no_fallback") for variant in variants)
        return next(filter(None, parsed), [])

    read_answer = functools.lru_cache(maxsize=64)(read)
    for line in sys.stdin:
        answer, response = json.loads(line)
        # No handler is installed for this signal, so it ends the process at any point.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        gold = read_answer(answer)
        print("parsed" if gold else "nan", flush=True)
        if gold:
            print(float(verify(gold, read(response), timeout_seconds=None)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


THOUSANDS = re.compile(r"(?<=\d)\{,\}(?=\d{3}(?!\d))")  # LaTeX's comma in 70{,}000, which would turn an equation into a set
DELIMITED = re.compile(r"\$|\\boxed|(?<!\\)\\[(\[]")
COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[A-Za-z ]*\})?")  # and an argument of letters, as in \text{ cm}
WORD = re.compile(r"(?<!\S)(?!(?:and|or)\b)[A-Za-z]{2,}[.,:;!?]?(?!\S)")
