"""The verifier `tests`: runs the program in a response against the tests in the gold answer."""

import re
from concurrent.futures import ThreadPoolExecutor

from evolve_ray.config import options
from evolve_ray.refine.asks import Verdict
from evolve_ray.score.sandbox import Limits, check_machine, run_program

FENCE = re.compile(r"^```[ \t]*(?:python|py)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
AT_ONCE = 4  # programs that run at the same time: most of the time passes while one that never ends is waited for


class ProgramTests:
    """1.0 if the program in the response passes all tests, otherwise 0.0 with the output as the verdict's text.

    The gold answer is Python code, for example `assert add(1, 2) == 3` on each line; it runs after the program, in the same
    process. The program is the last fenced block of the response, or the whole response. NaN without a gold answer.
    """

    def __init__(self, verifier: options.Verifier, args: Limits = Limits()):  # noqa: B008 (frozen)
        self.limits = args
        check_machine()

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self.judge, answers, responses))

    def judge(self, answer: str | None, response: str) -> float:
        if answer is None:
            return Verdict(float("nan"), "there are no tests")
        outcome = run_program(f"{code_of(response)}\n\n{answer}\n", self.limits)
        return Verdict(float(outcome.passed), outcome.text)


def code_of(response: str) -> str:
    """The last fenced block of a response; the whole response if it has none."""
    blocks = FENCE.findall(response)
    return blocks[-1] if blocks else response
