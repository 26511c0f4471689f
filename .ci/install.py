"""Makes .venv and installs the locked packages into it; says what to do where something is missing.

Standard library only. Runs again at once when nothing changed: a stamp in .venv holds the hash of the lock.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
LOCK = ROOT / "cluster" / "requirements-cpu.txt"
STAMP = VENV / ".installed"
UV = "uv==0.13.8"
NEEDED_DISK_GIB = 8
NEEDED_MEMORY_GIB = 8


def main() -> int:
    wanted = hashlib.sha256(LOCK.read_bytes() + (ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    check_machine()
    print("installing into .venv (about two minutes with a warm package cache, a few more without)", flush=True)
    if not (VENV / "bin" / "python").exists():
        run([sys.executable, "-m", "venv", str(VENV)], "making .venv failed; on Debian and Ubuntu: apt-get install python3-venv")
    python = str(VENV / "bin" / "python")
    environment = dict(os.environ)
    if environment.get("PIP_FIND_LINKS"):
        environment.setdefault("UV_FIND_LINKS", environment["PIP_FIND_LINKS"])
    run(
        [python, "-m", "pip", "install", "--quiet", UV], "pip cannot reach the package index; check the network or pip's settings"
    )
    lock = ["--no-deps", "-r", str(LOCK)]
    installed = subprocess.run([python, "-m", "uv", "pip", "install", "--python", python, *lock], env=environment).returncode == 0
    if not installed:
        print("uv could not install the lock; trying pip, which reads its own configuration (slower)", flush=True)
        run(
            [python, "-m", "pip", "install", *lock],
            "the locked packages could not be installed. If the line above names torch: the lock wants its CPU build "
            "(2.13.0+cpu), which PyTorch publishes on its own index; set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index "
            "(see 'Start Locally' on pytorch.org) and run the same command again",
        )
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(ROOT)], "installing evolve-ray itself failed")
    compile_all(python)
    STAMP.write_text(wanted)
    print("installed", flush=True)
    return 0


def compile_all(python: str) -> None:
    """Bytecode of every package, once. Ray starts many processes; without it (uv makes none, and where
    PYTHONDONTWRITEBYTECODE is set no process keeps its own) each of them compiles vLLM again: 49 s in place of 18 s.
    Exits non-zero for packages' templates that are not Python, which is no fault."""
    packages = next((VENV / "lib").glob("python*/site-packages"))
    subprocess.run([python, "-m", "compileall", "-qq", "-j", "0", str(packages)])


def check_machine() -> None:
    """Everything that the demo and the tests need from the machine, all faults at once."""
    faults = []
    if sys.version_info[:2] != (3, 11):
        faults.append(f"Python is {sys.version.split()[0]}, the lock is for 3.11: run `make PYTHON=python3.11 ...`")
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        faults.append(
            f"the lock is for Linux on x86-64, this is {sys.platform} on {os.uname().machine}: use a Linux machine or container"
        )
    if not (shutil.which("g++") or shutil.which("c++")):
        faults.append("no C++ compiler, which DeepSpeed needs at its first start: apt-get install g++")
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < NEEDED_DISK_GIB:
        faults.append(f"{free:.1f} GiB of disk are free at {ROOT}, {NEEDED_DISK_GIB} are needed: free some")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if memory < NEEDED_MEMORY_GIB:
        faults.append(f"the machine has {memory:.1f} GiB of memory, {NEEDED_MEMORY_GIB} are needed: use a larger one")
    if faults:
        stop("; ".join(faults))


def run(command: list[str], advice: str) -> None:
    if subprocess.run(command).returncode:
        stop(advice)


def stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(5)


if __name__ == "__main__":
    sys.exit(main())
