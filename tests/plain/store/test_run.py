"""What is committed stays as it is; what is not as its manifest says is refused by file and hash."""

import json
import os

import pytest

from evolve_ray.errors import IntegrityError, ResourceError, UserError
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import MANIFEST, commit, read_manifest
from evolve_ray.store.run import Run, Stage


def fill(work, text="rows"):
    (work / "part").mkdir(parents=True)
    (work / "rows.txt").write_text(text)
    (work / "part" / "deep.txt").write_text("deep")
    return work


@pytest.fixture
def committed(tmp_path):
    """A committed folder with two files."""
    return commit(fill(tmp_path / "work"), tmp_path / "final", stage="pairs", key="k1", inputs={"a": "b"}, num_rows=3).folder


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_manifest_lists_every_file_with_its_size_and_hash(committed):
    body = json.loads((committed / MANIFEST).read_text())
    assert body["files"] == {
        name: {"bytes": (committed / name).stat().st_size, "sha256": sha256_file(committed / name)}
        for name in ("rows.txt", "part/deep.txt")
    }
    assert (body["stage"], body["key"], body["inputs"], body["stats"]) == ("pairs", "k1", {"a": "b"}, {"num_rows": 3})


def test_commit_moves_the_folder_with_its_manifest_already_in_place(tmp_path, monkeypatch):
    seen, rename = [], os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (seen.append(sorted(tree(old))), rename(old, new)))
    commit(fill(tmp_path / "work"), tmp_path / "final", stage="s", key="k")
    assert seen == [[MANIFEST, "part/deep.txt", "rows.txt"]]
    assert not (tmp_path / "work").exists()


def test_everything_is_synced_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    calls, rename, sync = [], os.rename, os.fsync
    monkeypatch.setattr(os, "rename", lambda old, new: (calls.append("rename"), rename(old, new)))
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), sync(fd)))
    commit(fill(tmp_path / "work"), tmp_path / "final", stage="s", key="k")
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") + 1 :]
    assert set(before) == {"rows.txt", "deep.txt", MANIFEST, "part", "work"}
    assert before.index(MANIFEST) > max(before.index("rows.txt"), before.index("deep.txt"))
    assert after == [tmp_path.name]


def test_second_commit_of_the_same_key_keeps_the_first_bytes(committed, tmp_path):
    before = tree(committed)
    manifest = commit(fill(tmp_path / "again", "other"), committed, stage="pairs", key="k1")
    assert tree(committed) == before
    assert manifest.files["rows.txt"]["sha256"] == sha256_file(committed / "rows.txt")
    assert not (tmp_path / "again").exists()


def test_late_writer_of_another_key_fails_and_changes_nothing(committed, tmp_path):
    before = tree(committed)
    with pytest.raises(IntegrityError, match="another writer committed it meanwhile"):
        commit(fill(tmp_path / "late", "other"), committed, stage="pairs", key="k2")
    assert tree(committed) == before


def test_name_taken_by_a_folder_without_manifest_is_not_overwritten(tmp_path):
    fill(tmp_path / "final", "precious")
    with pytest.raises(ResourceError):
        commit(fill(tmp_path / "work"), tmp_path / "final", stage="s", key="k")
    assert (tmp_path / "final" / "rows.txt").read_text() == "precious"


def test_identity_names_content_and_neither_place_nor_counts(tmp_path):
    one, two, three = (
        commit(fill(tmp_path / f"w{n}", text), tmp_path / f"f{n}", stage="s", key="k", seconds=n)
        for n, text in enumerate(["same", "same", "other"])
    )
    assert one.identity == two.identity
    assert one.identity != three.identity


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def damage_truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def damage_delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_delete])
@pytest.mark.parametrize("name", ["rows.txt", "part/deep.txt"])
def test_damaged_file_is_named_with_both_hashes_and_the_way_out(committed, name, damage):
    expected = sha256_file(committed / name)
    damage(committed / name)
    actual = "missing" if damage is damage_delete else sha256_file(committed / name)
    with pytest.raises(IntegrityError) as caught:
        read_manifest(committed, verify=True)
    assert str(caught.value).startswith(f"{committed / name}: sha256 is {actual}, but its manifest says {expected}")
    assert f"delete {committed}" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b'{"stage": "s"}', b"null"])
def test_damaged_manifest_is_an_integrity_error_that_names_it(committed, data):
    (committed / MANIFEST).write_bytes(data)
    with pytest.raises(IntegrityError, match=r"MANIFEST\.json: is damaged"):
        read_manifest(committed)


def test_folder_without_manifest_is_not_committed(tmp_path):
    fill(tmp_path / "half")
    assert read_manifest(tmp_path / "half") is None
    assert read_manifest(tmp_path / "nowhere") is None


def test_file_that_the_manifest_does_not_list_is_refused(committed):
    (committed / "stray.txt").write_text("stray")
    with pytest.raises(IntegrityError, match=r"does not list stray\.txt"):
        read_manifest(committed).path("stray.txt")


def test_stage_of_the_same_key_is_returned_as_it_is(tmp_path):
    fill(Stage(tmp_path / "pairs", "pairs", "key").work)
    Stage(tmp_path / "pairs", "pairs", "key").commit([{"id": "x"}, {"id": "y"}], num_rows=1)
    manifest = Stage(tmp_path / "pairs", "pairs", "key").committed()
    assert manifest.stats == {"num_rows": 1, "num_rejected": 2}
    assert manifest.path("rejected.jsonl").read_bytes() == b'{"id":"x"}\n{"id":"y"}\n'


def test_stage_of_another_key_is_refused(committed):
    with pytest.raises(UserError, match="made from other inputs or options"):
        Stage(committed, "pairs", "k2").committed()


def test_stage_verifies_what_it_returns(committed):
    damage_flip(committed / "rows.txt")
    with pytest.raises(IntegrityError):
        Stage(committed, "pairs", "k1").committed()


def test_stage_of_another_key_is_put_aside_whole(committed):
    before, stage = tree(committed), Stage(committed, "pairs", "k2")
    aside = stage.put_aside()
    assert tree(aside) == before
    assert stage.committed() is None
    assert stage.superseded() is None


def test_stage_of_the_same_key_is_not_superseded(committed):
    assert Stage(committed, "pairs", "k1").superseded() is None


def test_working_folders_of_different_keys_are_different(tmp_path):
    assert Stage(tmp_path / "pairs", "pairs", "a" * 64).work != Stage(tmp_path / "pairs", "pairs", "b" * 64).work


def test_start_empties_the_working_folder(tmp_path):
    stage = Stage(tmp_path / "pairs", "pairs", "key")
    (stage.start() / "left.txt").touch()
    assert list(stage.start().iterdir()) == []


def test_resume_keeps_what_is_committed_and_drops_what_is_half_written(tmp_path):
    stage = Stage(tmp_path / "scores", "scores", "key")
    fill(stage.resume() / "shard-00000")
    fill(stage.work / ".shard-00001-abc")
    assert [path.name for path in stage.resume().iterdir()] == ["shard-00000"]


def test_events_are_one_json_line_each_whatever_their_text(tmp_path):
    run = Run(tmp_path)
    run.event("one", text="a\nb\u2028c\ud800", path=tmp_path)
    run.event("two")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [event["event"] for event in events] == ["one", "two"]
    assert events[0]["text"] == "a\nb\u2028c?"


def test_time_of_a_stage_is_an_event_only_when_it_ended_well(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(ZeroDivisionError), run.timed("pairs", 1):
        raise ZeroDivisionError
    with run.timed("pairs", 2):
        pass
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().split("\n")[:-1]]
    kinds = [(event["event"], event["iteration"]) for event in events]
    assert kinds == [("stage_start", 1), ("stage_start", 2), ("stage_end", 2)]


def test_inputs_and_what_was_put_aside_are_no_results(tmp_path):
    run = Run(tmp_path)
    for folder in ("iteration-00/held_out", "iteration-01/prompts", "iteration-01/.superseded-scores-1"):
        (tmp_path / f"{folder}.work").mkdir(parents=True)
        commit(tmp_path / f"{folder}.work", tmp_path / folder, stage="s", key="k")
    assert not run.has_results()
    (tmp_path / "w").mkdir()
    commit(tmp_path / "w", tmp_path / "iteration-01" / ".generations-abc", stage="shard", key="k")
    assert run.has_results()
