"""A shard is committed once; a stage is committed when every row that went in is accounted for."""

from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from evolve_ray.errors import IntegrityError
from evolve_ray.pools import retries
from evolve_ray.pools.actors import Host
from evolve_ray.pools.worker import ShardWorker
from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.run import Stage
from evolve_ray.store.shards import finish, read_rows, read_slice

PROMPTS = [
    {"prompt_id": f"p{n}", "prompt": f"text {n}", "answer": None, "split": "s", "file": "f", "line": n, "num_tokens": 1}
    for n in range(5)
]


class Doubler(ShardWorker):
    """Scores every prompt but p3, which it rejects."""

    schema = rows.SCORE
    calls = 0

    def process(self, shard, prompts):
        self.calls += 1
        good = [prompt for prompt in prompts if prompt["prompt_id"] != "p3"]
        made = [
            {"draft_id": p["prompt_id"], "prompt_id": p["prompt_id"], "score": 1.0 * p["line"], "correct": None} for p in good
        ]
        rejected = [rows.reject(prompt, "scores", "odd") for prompt in prompts if prompt not in good]
        return made, rejected, {"num_in": len(prompts), "seconds": 0.5}


@pytest.fixture
def stage(tmp_path):
    """A stage whose input is committed in shards of two prompts."""
    rows.write_table(tmp_path / "prompts.parquet", PROMPTS, rows.PROMPT)
    stage = Stage(tmp_path / "run" / "scores", "scores", "key")
    stage.resume()
    return stage


@pytest.fixture
def worker(stage, tmp_path):
    return Doubler(SimpleNamespace(work=str(stage.work), prompts=str(tmp_path / "prompts.parquet"), shard_prompts=2, key="key"))


def test_shards_are_disjoint_slices_that_cover_the_table(stage, tmp_path):
    parts = [read_slice(tmp_path / "prompts.parquet", shard, 2) for shard in range(3)]
    assert [row for part in parts for row in part] == PROMPTS
    assert [len(part) for part in parts] == [2, 2, 1]


@pytest.mark.parametrize("group_rows", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_a_slice_reads_only_the_row_groups_that_it_touches(tmp_path, group_rows, size, monkeypatch):
    table = [{**PROMPTS[0], "prompt_id": f"p{n}"} for n in range(19)]
    rows.write_table(tmp_path / "prompts.parquet", table, rows.PROMPT, group_rows=group_rows)
    read, groups = pq.ParquetFile.read_row_groups, []
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda file, some: groups.append(len(some)) or read(file, some))
    parts = [read_slice(tmp_path / "prompts.parquet", shard, size) for shard in range(-(-19 // size) + 1)]
    assert [row for part in parts for row in part] == table
    assert max(groups) <= min(-(-19 // group_rows), -(-size // group_rows) + 1)


def test_shard_is_computed_once_and_returned_afterwards(worker, stage):
    first = worker.commit_shard(1)
    before = (stage.work / "shard-00001" / "rows.parquet").stat().st_mtime_ns
    assert worker.commit_shard(1) == first == {"num_in": 2, "seconds": 0.5, "num_rows": 1, "num_rejected": 1}
    assert worker.calls == 1
    assert (stage.work / "shard-00001" / "rows.parquet").stat().st_mtime_ns == before


def test_shard_that_died_half_written_is_computed_again(worker, stage):
    (stage.work / ".shard-00001-dead").mkdir()
    (stage.work / ".shard-00001-dead" / "rows.parquet").write_bytes(b"half")
    stage.resume()
    worker.commit_shard(1)
    assert sorted(path.name for path in stage.work.iterdir()) == [retries.FOLDER, "shard-00001"]


def test_stage_collects_counts_rejected_rows_and_rows_in_order(worker, stage):
    for shard in (2, 0, 1):
        worker.commit_shard(shard)
    manifest = finish(stage, 3, 5)
    assert manifest.stats == {"num_in": 5, "num_shards": 3, "num_rows": 4, "num_rejected": 1, "seconds": 1.5}
    assert [row["id"] for row in rows.read_jsonl(manifest.path("rejected.jsonl"))] == ["p3"]
    assert [row["score"] for row in read_rows(manifest)] == [0.0, 1.0, 2.0, 4.0]
    assert read_manifest(stage.final, verify=True) == manifest


def test_stage_with_a_missing_shard_is_not_committed(worker, stage):
    worker.commit_shard(0)
    with pytest.raises(IntegrityError, match="shard-00001: is missing"):
        finish(stage, 2, 4)
    assert stage.committed() is None


@pytest.mark.parametrize("expected", [4, 6])
def test_stage_that_lost_or_doubled_rows_is_not_committed(worker, stage, expected):
    for shard in range(3):
        worker.commit_shard(shard)
    with pytest.raises(IntegrityError, match=f"{expected} rows went in, but 5 were accounted for"):
        finish(stage, 3, expected)
    assert stage.committed() is None


def test_stray_files_do_not_become_part_of_a_stage(worker, stage):
    for shard in range(3):
        worker.commit_shard(shard)
    (stage.work / "shard-00099").mkdir()
    (stage.work / "note.txt").write_text("stray")
    manifest = finish(stage, 3, 5)
    assert {name.split("/")[0] for name in manifest.files} == {"shard-00000", "shard-00001", "shard-00002", "rejected.jsonl"}


def test_identity_of_a_stage_does_not_change_with_the_seconds_that_its_shards_took(worker, stage, tmp_path, monkeypatch):
    def whole(seconds, final):
        stage = Stage(final, "scores", "key")
        process = Doubler.process
        monkeypatch.setattr(Doubler, "process", lambda *given: (*process(*given)[:2], {"num_in": 2, "seconds": seconds}))
        worker.spec.work = str(stage.resume())
        worker.commit_shard(0)
        return finish(stage, 1, 2)

    one, two = whole(1.0, tmp_path / "one" / "scores"), whole(2.0, tmp_path / "two" / "scores")
    assert one.stats["seconds"] != two.stats["seconds"]
    assert one.identity == two.identity


def test_actor_keeps_its_worker_and_renews_it_for_another_spec(worker):
    host = Host(Doubler)
    host.call(worker.spec, "commit_shard", 0)
    kept = host.worker
    other = SimpleNamespace(**{**vars(worker.spec), "key": "other"})
    host.call(other, "commit_shard", 1)
    assert host.worker is kept
    assert kept.spec is other
