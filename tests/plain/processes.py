"""Processes for tests: a fresh interpreter, and a child that dies at a chosen disk call."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DIED = 9
DISK_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints with the repository on its path; it must end well."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def die_at(number: int, work: Callable[[], Any]) -> bool:
    """Runs `work` in a child that dies right before its disk call `number`; False once `work` has fewer calls than that."""
    child = os.fork()
    if child == 0:
        calls = 0

        def count() -> None:
            nonlocal calls
            if calls == number:
                os._exit(DIED)  # no buffer is flushed, no handler runs: for the disk this is kill -9
            calls += 1

        sync = os.fsync
        os.fsync = lambda descriptor: (count(), sync(descriptor))[1]
        sys.addaudithook(lambda event, _: count() if event in DISK_EVENTS else None)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, DIED), f"the child ended with {code}"
    return code == DIED
