"""A disk that is full at any write of a stage, and not only at a sync: one sentence, nothing half-committed, and the way on."""

import builtins
import errno
import os
import shutil

import pyarrow.parquet as pq
import pytest

from evolve_ray.config.load import load
from evolve_ray.errors import ResourceError, run_command
from evolve_ray.plan.plan import check_space
from evolve_ray.stages import pairs
from evolve_ray.store import manifest, rows, run
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.run import Run
from tests.plain.stages.test_pairs import SCORES, tables

__all__ = ["tables"]  # a fixture


class Disk:
    """Counts the writes of everything that a selection of pairs writes with, and refuses one, or that and all after it."""

    def __init__(self, monkeypatch):
        self.refuse(None)
        for name in ("__init__", "write_table", "close"):
            monkeypatch.setattr(pq.ParquetWriter, name, self.counted(name, getattr(pq.ParquetWriter, name)))
        for module in (pairs, manifest, rows, run):
            monkeypatch.setattr(module, "open", self.open, raising=False)

    def refuse(self, number, *, and_all_after=False):
        self.number, self.and_all_after, self.done, self.refused = number, and_all_after, 0, set()

    def write(self, what):
        self.done += 1
        if self.number is not None and (self.done > self.number if self.and_all_after else self.done == self.number + 1):
            self.refused.add(what)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def counted(self, name, method):
        def write(writer, *given, **named):
            try:
                self.write(f"parquet {name}")
            except OSError:
                writer.is_open = False  # who closes it again hears nothing, as from pyarrow itself
                raise
            return method(writer, *given, **named)

        return write

    def open(self, path, mode="r", *given, **named):
        file = builtins.open(path, mode, *given, **named)  # noqa: SIM115 (handed on)
        return file if "r" in mode else File(self, file, path.name)


class File:
    """A file that is open for writing on such a disk."""

    def __init__(self, disk, file, name):
        self.disk, self.file, self.name = disk, file, name

    def write(self, data):
        self.disk.write(self.name)
        return self.file.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("and_all_after", [False, True], ids=["that write", "that write and all after it"])
def test_disk_that_is_full_at_any_write_of_a_selection_ends_the_run_and_the_next_one_gives_the_same_bytes(
    tables, monkeypatch, capsys, and_all_after
):
    context, *inputs = tables(SCORES)
    iteration, disk = context.run.iteration(1), Disk(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and refused in test_store_faults.py

    def command():
        pairs.select(context, 1, *inputs[1:])
        return 0

    assert run_command(command, "the same command") == 0
    writes, twin = disk.done, {path.name: path.read_bytes() for path in (iteration / "pairs").iterdir()}
    hit = set()
    for number in range(writes):
        shutil.rmtree(iteration / "pairs")
        disk.refuse(number, and_all_after=and_all_after)
        assert run_command(command, "the same command") == 5
        hit |= disk.refused
        said = capsys.readouterr().err
        assert said.startswith(f"error: {context.run.root}/"), said
        assert (said.count("\n"), "No space left on device" in said, "free space" in said) == (1, True, True)
        made = read_manifest(iteration / "pairs", verify=True)
        assert made is not None or not (iteration / "pairs").exists()
        disk.refuse(None)
        assert run_command(command, "the same command") == 0
        assert {path.name: path.read_bytes() for path in (iteration / "pairs").iterdir()} == twin
    parquet = {f"parquet {name}" for name in ("__init__", "write_table", "close")}
    assert hit == parquet | {"rejected.jsonl", "MANIFEST.json", "events.jsonl"}


def test_space_that_is_too_small_is_told_with_the_path(recipe, tmp_path):
    config = load(recipe(), ["prompts.per_iteration=1000000000000", "toy.seed=0", "prompts.path=toy:train"])
    with pytest.raises(ResourceError) as caught:
        check_space(config, Run(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: 3 iterations need about ")
    assert "; free space, choose another --run" in str(caught.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_file_that_the_disk_refuses_is_named_wherever_that_was(tmp_path, capsys, code):
    def command():
        raise OSError(code, os.strerror(code), str(tmp_path / "a file"))

    assert run_command(command, "the same command") == 5
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path}/a file: {os.strerror(code)}; free space, then continue with: the same command\n"
