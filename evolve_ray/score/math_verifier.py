"""The verifier `math`: compares mathematical answers with math-verify, in a child process."""

import contextlib
import functools
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from evolve_ray.errors import ResourceError, UserError


class MathMatch:
    """1.0 if the response is mathematically equal to the gold answer, 0.0 if not.

    NaN if the gold answer cannot be read: that is a fault of the data. `statements` finds what a text states as its answer,
    `math_reading` reads it with math-verify, `math_equality` compares.

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
        """The value of one response."""
        # One line when the answer is parsed, then one with the value; "" if the child was killed meanwhile.
        self._ask([answer, response])
        line = self._read()
        if line == "parsed":
            return float(self._read() or 0.0)
        return float(line or math.nan)

    def check_gold(self, answer: str) -> str:
        """What is wrong with a gold answer; "" if nothing is."""
        self._ask([answer])
        line = self._read()
        return json.loads(line) if line else f"cannot be read as mathematics in {self.CPU_SECONDS:g} s"

    def _ask(self, texts: list[str]) -> None:
        """Sends a request; starts the child process if there is none."""
        if self._child is None:
            code = f"from evolve_ray.score.math_verifier import serve_math; serve_math({self.CPU_SECONDS}, {self.MEMORY_BYTES})"
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            command = [sys.executable, "-c", code]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        with contextlib.suppress(BrokenPipeError):  # the child has ended: `_read` returns ""
            self._child.stdin.write(json.dumps(texts) + "\n")
            self._child.stdin.flush()

    def _read(self) -> str:
        """A line of the child; "" if it was killed."""
        line = self._child.stdout.readline()
        if not line:
            self._close_child()
        return line.strip()

    def _close_child(self) -> None:
        """Waits for a child that has ended. Raises ResourceError if it was not killed by a signal."""
        code = self._child.wait()
        self._child = None
        if code >= 0:
            raise ResourceError(f"verifier 'math': its process ended with exit code {code}; see the log of the scorer")


def serve_math(cpu_seconds: float, memory_bytes: int) -> None:
    """The child process of `MathMatch`.

    Reads lines of JSON: [answer, response], for which it prints "parsed" and a value, or "nan"; or [answer], for which it prints
    what is wrong with that gold answer, as JSON.
    """
    import logging
    import resource

    from evolve_ray.score.math_equality import equals, gold_fault, read_gold

    logging.disable(logging.CRITICAL)  # the library warns that its timeouts are off
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    sys.set_int_max_str_digits(0)  # the limits on time and memory are those of this process
    read_answer = functools.lru_cache(maxsize=64)(read_gold)
    for line in sys.stdin:
        answer, *responses = json.loads(line)
        # No handler is installed for this signal, so it ends the process at any point.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        if not responses:
            print(json.dumps(attempt(gold_fault, answer, otherwise="cannot be read as mathematics")), flush=True)
        elif gold := attempt(read_answer, answer, otherwise=None):
            print("parsed", flush=True)
            print(float(attempt(equals, gold, responses[0], otherwise=False)), flush=True)
        else:
            print("nan", flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def attempt(function: Callable[..., Any], *arguments: Any, otherwise: Any) -> Any:
    """The result of a function. SymPy raises errors of many types for what it cannot handle; each costs its own verdict alone."""
    try:
        return function(*arguments)
    except Exception:
        return otherwise
