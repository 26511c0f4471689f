"""The install step says what the machine lacks, all at once, before it downloads anything."""

import importlib.util
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

from tests.plain.processes import ROOT


@pytest.fixture
def install(tmp_path, monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / ".ci" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    return module


def test_missing_compiler_and_full_disk_are_named_together(install, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: usage(0, 0, 2**30))
    with pytest.raises(SystemExit) as stopped:
        install.main()
    assert stopped.value.code == 5
    told = capsys.readouterr().err
    assert "apt-get install g++" in told
    assert "1.0 GiB of disk are free" in told


def test_too_little_memory_and_another_python_are_named(install, monkeypatch, capsys):
    monkeypatch.setattr(install.os, "sysconf", lambda name: 1024)
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 0))
    with pytest.raises(SystemExit):
        install.main()
    told = capsys.readouterr().err
    assert "GiB of memory" in told
    assert "PYTHON=python3.11" in told


def test_what_is_installed_is_not_installed_again(install, monkeypatch):
    text = install.LOCK.read_bytes() + (install.ROOT / "pyproject.toml").read_bytes() + str(install.ROOT).encode()
    install.STAMP.write_text(install.hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(install, "check_machine", lambda: pytest.fail("the machine was checked"))
    assert install.main() == 0


def test_torch_that_is_not_found_comes_with_the_way_out(install, monkeypatch, capsys, tmp_path):
    failing = namedtuple("result", "returncode")
    monkeypatch.setattr(install, "check_machine", lambda: None)
    monkeypatch.setattr(install, "VENV", tmp_path)
    calls: list[list[str]] = []

    def run(command, **_):
        calls.append(command)
        return failing(int("-r" in command))

    monkeypatch.setattr(install.subprocess, "run", run)
    with pytest.raises(SystemExit):
        install.main()
    assert sum("-r" in command for command in calls) == 2, "uv, then pip"
    assert "PIP_EXTRA_INDEX_URL" in capsys.readouterr().err


def test_processes_find_the_packages_compiled():
    """Else each of Ray's processes compiles them anew; the first CI machine that forbade bytecode took four times as long."""
    origin = importlib.util.find_spec("ray").origin
    assert Path(importlib.util.cache_from_source(origin)).exists(), "run `make clean install`"
