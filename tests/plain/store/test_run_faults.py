"""A process that dies, or a disk that is full, at any moment of a commit leaves the old or the new, never half."""

import errno
import multiprocessing
import os
import shutil
import signal
import time
from types import SimpleNamespace

import psutil
import pytest

from evolve_ray.errors import IntegrityError, ResourceError
from evolve_ray.pools.worker import ShardWorker
from evolve_ray.store import rows
from evolve_ray.store.files import write_atomic
from evolve_ray.store.manifest import MANIFEST, commit, read_manifest
from evolve_ray.store.run import Stage
from evolve_ray.store.shards import finish
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


class Committer(ShardWorker):
    """Makes one row of its shard."""

    schema = rows.SCORE

    def process(self, shard, prompts):
        made = [{"draft_id": p["prompt_id"], "prompt_id": p["prompt_id"], "score": 1.0, "correct": None} for p in prompts]
        return made, [], {"num_in": len(prompts)}


@pytest.mark.slow
def test_shard_that_dies_at_any_disk_call_is_committed_whole_or_not_at_all(tmp_path):
    prompt = {"prompt_id": "p", "prompt": "x", "answer": None, "split": "s", "file": "f", "line": 1, "num_tokens": 1}
    rows.write_table(tmp_path / "prompts.parquet", [prompt], rows.PROMPT)
    number, outcomes, alive = 0, [], True
    while alive:
        stage = Stage(tmp_path / str(number) / "scores", "scores", "key")
        spec = SimpleNamespace(work=str(stage.resume()), prompts=str(tmp_path / "prompts.parquet"), shard_prompts=1, key="key")
        alive = die_at(number, lambda spec=spec: Committer(spec).commit_shard(0))
        outcomes.append(read_manifest(stage.work / "shard-00000", verify=True) is not None)
        stage.resume()
        assert Committer(spec).commit_shard(0) == {"num_in": 1, "num_rows": 1, "num_rejected": 0}
        manifest = finish(stage, 1, 1)
        assert sorted(manifest.files) == [
            "rejected.jsonl",
            *(f"shard-00000/{n}" for n in (MANIFEST, "rejected.jsonl", "rows.parquet")),
        ]
        number += 1
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) >= 12


class Loser(Committer):
    """Rejects its row."""

    def process(self, shard, prompts):
        return [], [rows.reject(prompt, "scores", "no number") for prompt in prompts], {"num_in": len(prompts)}


@pytest.mark.slow
def test_sharded_stage_that_dies_at_any_disk_call_of_its_end_is_committed_whole_or_not_at_all(tmp_path):
    """The clean-up of what dead actors left, then the commit; the shards, which are what took long, stay as they are."""
    prompt = {"prompt_id": "p", "prompt": "x", "answer": None, "split": "s", "file": "f", "line": 1, "num_tokens": 1}
    rows.write_table(tmp_path / "prompts.parquet", [prompt] * 2, rows.PROMPT)
    whole = tmp_path / "whole"
    spec = SimpleNamespace(work=str(whole), prompts=str(tmp_path / "prompts.parquet"), shard_prompts=1, key="key")
    (whole / "left" / "deep").mkdir(parents=True)
    (whole / "left" / "deep" / "rows.parquet").write_bytes(b"half")
    (whole / "engine-0.beat").write_bytes(b"1")
    Committer(spec).commit_shard(0)
    Loser(spec).commit_shard(1)
    number, outcomes, states, held, alive = 0, [], set(), set(), True
    while alive:
        stage = Stage(tmp_path / str(number) / "scores", "scores", "key")
        shutil.copytree(whole, stage.work)
        alive = die_at(number, lambda stage=stage: finish(stage, 2, 2))
        manifest = read_manifest(stage.final, verify=True)
        outcomes.append(manifest is not None)
        if manifest is None:
            shards = [read_manifest(stage.work / f"shard-0000{shard}", verify=True) for shard in range(2)]
            assert all(shards), "a committed shard was lost"
            states.add(tuple(sorted(path.name for path in stage.work.rglob("*") if "shard-" not in str(path))))
            stage.resume()
            manifest = finish(stage, 2, 2)
        held.add((manifest.identity, tuple(sorted(path.name for path in stage.final.iterdir()))))
        assert [manifest.stats[name] for name in ("num_rows", "num_rejected", "num_in")] == [1, 1, 2]
        number += 1
    assert len(held) == 1, "what was committed depends on where it died"
    assert held.pop()[1] == (MANIFEST, "rejected.jsonl", "shard-00000", "shard-00001")
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) >= 12
    assert outcomes.count(True) >= 2
    assert len(states) >= 4, "it never died in the midst of the clean-up"


def test_stage_that_is_put_aside_is_whole_in_one_place_or_the_other(tmp_path):
    number, alive = 0, True
    while alive:
        old = Stage(tmp_path / str(number) / "pairs", "pairs", "old")
        write(old)
        old.commit()
        stage = Stage(old.final, "pairs", "new")
        alive = die_at(number, stage.put_aside)
        aside = old.final.with_name(".superseded-pairs-old")
        assert (read_manifest(old.final, verify=True) is None) != (read_manifest(aside, verify=True) is None)
        number += 1
    assert number >= 2


def error_of(work):
    try:
        work()
    except ResourceError as error:
        return error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_disk_that_refuses_any_single_sync_commits_nothing_and_the_next_run_succeeds(tmp_path, monkeypatch, code):
    sync, number, refused = os.fsync, 0, True
    while refused:
        stage, left = Stage(tmp_path / f"{code}-{number}" / "pairs", "pairs", "key"), number

        def refuse(descriptor):
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(code, os.strerror(code))
            sync(descriptor)

        write(stage)
        monkeypatch.setattr(os, "fsync", refuse)
        told = error_of(stage.commit)
        refused = told is not None
        assert not refused or (told.exit_code, os.strerror(code) in str(told), "MiB are free" in str(told)) == (5, True, True)
        monkeypatch.setattr(os, "fsync", sync)
        if read_manifest(stage.final, verify=True) is None:
            write(stage)
            stage.commit()
        assert read_manifest(stage.final, verify=True) is not None
        number += 1
    assert number >= 6


def test_late_writer_that_wakes_after_its_replacement_committed_changes_nothing(tmp_path):
    """A real process, stopped with everything but the rename done, and woken when another one has committed."""
    late, final = tmp_path / "late", tmp_path / "pairs"
    late.mkdir()
    (late / "rows.txt").write_text("late")
    waiting = multiprocessing.get_context("fork").Process(target=commit_when_woken, args=(late, final))
    waiting.start()
    while not (tmp_path / "asleep").exists():
        time.sleep(0.01)
    while psutil.Process(waiting.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.txt").write_text("mine")
    commit(tmp_path / "mine", final, stage="pairs", key="other")
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    os.kill(waiting.pid, signal.SIGCONT)
    waiting.join(20)
    assert waiting.exitcode == 4, "the late writer was not told"
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before


def commit_when_woken(late, final):
    rename = os.rename

    def sleep_first(*names):
        (late.parent / "asleep").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
        rename(*names)

    os.rename = sleep_first
    try:
        commit(late, final, stage="pairs", key="key")
    except IntegrityError as error:
        os._exit(error.exit_code)
    os._exit(0)


def test_file_replacement_that_dies_at_any_disk_call_leaves_old_or_new(tmp_path):
    path, number, seen, alive = tmp_path / "report.json", 0, [], True
    while alive:
        path.write_bytes(b"old")
        alive = die_at(number, lambda: write_atomic(path, b"new"))
        seen.append(path.read_bytes())
        number += 1
    assert set(seen) == {b"old", b"new"}
    assert seen[0] == b"old"
    assert seen[-1] == b"new"


def test_reader_of_a_replaced_file_keeps_the_old_bytes(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        write_atomic(path, b"newer")
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
        write_atomic(path, b"new")
