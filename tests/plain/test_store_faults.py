"""A process that dies, or a disk that is full, at any moment of a commit leaves the old or the new, never half."""

import os

import pytest

from evolve_ray import store
from evolve_ray.errors import ResourceError
from evolve_ray.store import MANIFEST, Stage, read_manifest
from tests.plain.processes import die_at

WHOLE = {"part/deep.txt": b"deep", "rows.txt": b"rows", "rejected.jsonl": b""}


def write(stage):
    """What a stage does before it commits."""
    (stage.start() / "part").mkdir()
    for name, data in WHOLE.items():
        (stage.work / name).write_bytes(data)


def test_commit_that_dies_at_any_disk_call_leaves_all_or_nothing(tmp_path):
    outcomes, number, alive = [], 0, True
    while alive:
        stage = Stage(tmp_path / str(number) / "pairs", "pairs", "key")
        write(stage)
        alive = die_at(number, stage.commit)
        manifest = read_manifest(stage.final, verify=True)
        outcomes.append(manifest is not None)
        if manifest is None:
            write(stage)
            manifest = stage.commit()
        assert {name: manifest.path(name).read_bytes() for name in manifest.files} == WHOLE
        number += 1
    assert outcomes == sorted(outcomes)  # nothing up to the rename, everything after it
    assert outcomes.count(False) >= 8
    assert outcomes.count(True) >= 2  # died after the rename, and not at all


def test_file_replacement_that_dies_at_any_disk_call_leaves_old_or_new(tmp_path):
    path, number, seen, alive = tmp_path / "report.json", 0, [], True
    while alive:
        path.write_bytes(b"old")
        alive = die_at(number, lambda: store.write_atomic(path, b"new"))
        seen.append(path.read_bytes())
        number += 1
    assert set(seen) == {b"old", b"new"}
    assert seen[0] == b"old"
    assert seen[-1] == b"new"


def test_reader_of_a_replaced_file_keeps_the_old_bytes(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        store.write_atomic(path, b"newer")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_under_the_manifest_commits_nothing(tmp_path):
    stage = Stage(tmp_path / "pairs", "pairs", "key")
    (stage.start() / MANIFEST).symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"pairs: cannot be written: .*No space left"):
        stage.commit()
    assert not stage.final.exists()


def test_full_disk_under_the_rejected_rows_commits_nothing(tmp_path):
    stage = Stage(tmp_path / "final", "s", "k")
    (stage.start() / "rejected.jsonl").symlink_to("/dev/full")
    with pytest.raises(ResourceError):
        stage.commit([{"id": "x"}])


def test_full_disk_under_a_replaced_file_is_a_resource_error(tmp_path):
    path = tmp_path / "report.json"
    path.with_name(f".report.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(ResourceError):
        store.write_atomic(path, b"new")
