"""The verifier `math`: equality of mathematical answers by math-verify, in a process of its own."""

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
            code = f"from evolve_ray.score.math_verifier import serve_math; serve_math({self.CPU_SECONDS}, {self.MEMORY_BYTES})"
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
