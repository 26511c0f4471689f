"""The verifier `tests`: programs against tests, and hostile programs that end as failed with the machine unharmed."""

import os
import time

import pytest

from evolve_ray.config.options import Verifier
from evolve_ray.errors import UserError
from evolve_ray.score import programs, sandbox
from evolve_ray.score.programs import code_of
from evolve_ray.score.sandbox import Limits, run_program
from evolve_ray.score.verifiers import build_verifier

TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
LIMITS = Limits(seconds=1.0, memory_mib=256)


def test_programs_pass_or_fail_with_the_words_of_the_failure():
    verifier = build_verifier(Verifier(name="tests"))
    responses = [
        "def add(a, b):\n    return a + b",
        "First:\n```python\ndef add(a, b):\n    return 0\n```\nBetter:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.",
        "def add(a, b):\n    return a - b",
        "I do not know.",
    ]
    values = verifier(["p"] * 4, [TESTS] * 4, responses)
    assert values == [1.0, 1.0, 0.0, 0.0]
    assert values[2].text.splitlines()[-1] == "AssertionError"
    assert 'File "program.py", line 4, in <module>' in values[2].text
    assert "SyntaxError" in values[3].text
    (unknown,) = verifier(["p"], [None], ["x"])
    assert unknown != unknown, "without tests there is no value"


def test_the_same_program_has_the_same_words():
    first, second = (run_program("print(object())\nprint({'a', 'b', 'c'})\nraise ValueError(__file__)", LIMITS) for _ in range(2))
    assert first == second
    assert first.text.splitlines()[-1] == "ValueError: program.py"


def test_the_last_fenced_block_is_the_program():
    assert code_of("```\nx = 1\n```\n```py\nx = 2\n```") == "x = 2\n"
    assert code_of("x = 3") == "x = 3"


HOSTILE = {
    "ends early": ("import os; os._exit(0)", "ended before its tests did"),
    "leaves": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "endless loop": ("while True: pass", "ended by the limit of time"),
    "fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "thread bomb": (
        "import threading as t\nwhile True: t.Thread(target=t.Event().wait, daemon=True).start()",
        "RuntimeError",
    ),
    "10 GB of memory": ("x = bytearray(10 << 30)", "MemoryError"),
    "memory in pieces": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
    "memory in a file": ("import os; os.memfd_create('x')", "PermissionError"),
    "network": ("import socket; socket.socket()", "PermissionError"),
    "another program": ("import subprocess; subprocess.run(['/bin/true'])", "PermissionError"),
    "flood of output": ("while True: print('x' * 100000)", "ended by the limit of output"),
    "signal to others": (f"import os; os.kill({os.getpid()}, 9)", "PermissionError"),
    "more rights": ("import resource as r; r.setrlimit(r.RLIMIT_CPU, (-1, -1))", "Error"),
    "another time": ("import time; time.clock_settime(0, 0)", "PermissionError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_ends_as_failed(name):
    source, end = HOSTILE[name]
    started = time.monotonic()
    outcome = run_program(source, LIMITS)
    assert not outcome.passed
    assert end in outcome.text
    assert time.monotonic() - started < 30


def test_no_file_is_written_changed_or_removed(tmp_path):
    target = tmp_path / "kept"
    target.write_text("as it was")
    here = f"import os, pathlib, shutil\npath = pathlib.Path({str(target)!r})\n"
    for attack in (
        "path.write_text('x')", "open(path, 'a')", "os.open(path, os.O_RDWR)", "os.open(path, os.O_RDONLY | os.O_TRUNC)",
        "path.unlink()", "path.rename(path.with_name('other'))", "path.chmod(0)", "os.truncate(path, 0)",
        "os.utime(path, (0, 0))", "path.with_name('new').write_text('x')",
        "path.with_name('new').mkdir()", "path.with_name('new').symlink_to(path)",
        "os.link(path, path.with_name('new'))", "shutil.rmtree(path.parent)", "os.mkfifo(path.with_name('new'))",
    ):  # fmt: skip
        outcome = run_program(here + attack, LIMITS)
        assert not outcome.passed, attack
        assert "PermissionError" in outcome.text, attack
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("kept", "as it was")]


def test_a_program_sees_no_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "canary")
    outcome = run_program("import os; print(dict(os.environ)); print(open('/proc/self/environ').read())", LIMITS)
    assert outcome.passed
    assert "canary" not in outcome.text


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    run_program("x = 1", LIMITS)
    assert list(tmp_path.iterdir()) == []


def test_limits_are_options_of_the_verifier():
    assert build_verifier(Verifier(name="tests", args={"seconds": 2})).limits == Limits(seconds=2.0)
    with pytest.raises(UserError, match=r"verifier\.args\.second: unknown option; did you mean 'seconds'\?"):
        build_verifier(Verifier(name="tests", args={"second": 2}))


def test_nothing_runs_where_rights_cannot_be_taken(monkeypatch):
    monkeypatch.setattr(sandbox, "MACHINES", {})
    with pytest.raises(UserError, match=r"verifier\.name: 'tests' runs programs only where Linux .*; use another"):
        programs.ProgramTests(Verifier(name="tests"))
