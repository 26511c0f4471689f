"""Runs one Python program that nobody trusts, in a child process without rights.

It has no network, starts no process, changes no file, signals nobody, and has limits of time, memory and output. A seccomp filter
and resource limits do that, without root (`sandbox_start.py`). It can read files that this process can read, and sees no
environment variables. Linux on x86-64 or arm64 only: elsewhere nothing runs.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from evolve_ray.config.option import option
from evolve_ray.errors import UserError
from evolve_ray.score.sandbox_start import MACHINES

START = Path(__file__).with_name("sandbox_start.py")
SHOWN = 1500  # characters of the output that are kept: the last ones
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LANG": "C.UTF-8"}
# The same words for CPU time and clock, because the load of the machine decides which limit is met first.
ENDS = {signal.SIGXCPU: "the limit of time", signal.SIGKILL: "the limit of time"}


@dataclass(frozen=True)
class Limits:
    """Limits of one program."""

    seconds: float = option("CPU time; on the clock three times that and 5 s more", 4.0, unit="s", above=0.0, high=3600.0)
    memory_mib: int = option("memory, as address space", 512, unit="MiB", low=64)
    output_mib: int = option("output", 4, unit="MiB", low=1)


@dataclass(frozen=True)
class Outcome:
    """Whether the program ended without an error, and the end of what it printed, or the limit that ended it."""

    passed: bool
    text: str


def check_machine() -> None:
    """Raises UserError where programs cannot be run without rights."""
    outcome = run_program("", Limits()) if sys.platform == "linux" and os.uname().machine in MACHINES else None
    if outcome is None or not outcome.passed:
        why = outcome.text if outcome else f"{sys.platform} on {os.uname().machine}"
        raise UserError(
            f"verifier.name: 'tests' runs programs only where Linux (x86-64 or arm64) can take all rights from them: {why}; use "
            "another verifier or machine"
        )


def run_program(source: str, limits: Limits) -> Outcome:
    """Runs `source` in a folder of its own and returns how it ended; the same program gives the same text."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="evolve-ray-program-") as folder, contextlib.ExitStack() as files:
        program = Path(folder) / "program.py"
        program.write_text(source, encoding="utf-8", errors="surrogatepass")
        output = files.enter_context(open(Path(folder) / "output", "w+b"))
        reader, writer = os.pipe()
        files.callback(os.close, reader)
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-B", str(START), json.dumps(dataclasses.asdict(limits)), str(program), str(writer)],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
            pass_fds=[writer], env=ENVIRONMENT,
        )  # fmt: skip
        os.close(writer)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(token.encode())
            process.stdin.close()
        try:
            code = process.wait(3 * limits.seconds + 5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        passed = code == 0 and os.read(reader, 64).decode() == token
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - 4 * SHOWN))
        text = output.read().decode("utf-8", "replace").replace(f"{folder}/", "")
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", text)[-SHOWN:].strip()
    if code < 0:
        # Without the output: how much of it was written by then is chance.
        text = f"ended by {ENDS.get(signal.Signals(-code), f'signal {signal.Signals(-code).name}')}"
    elif size >= limits.output_mib << 20:
        text = "ended by the limit of output"
    elif code == 0 and not passed:
        text = f"{text}\nended before its tests did".strip()
    return Outcome(passed, text)
