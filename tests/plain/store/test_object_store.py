"""A run in an object store, on a real S3-compatible server: what is committed arrives whole or not at all, and comes back."""

import contextlib
import hashlib
import os
import shutil
import signal
from pathlib import Path

import fsspec
import pytest

from evolve_ray.errors import IntegrityError, ResourceError
from evolve_ray.store.manifest import MANIFEST, commit, read_manifest
from evolve_ray.store.mirror import committed_places, loose_files
from evolve_ray.store.run import Run, Stage
from tests.stores import at, fetched, identities, make, mirror, objects_of, place, proxy, request, server, way

__all__ = ["at", "place", "proxy", "server", "way"]
PAIRS = "iteration-01/pairs"
SHARDS = "iteration-01/.generations-key"


def make_part(root, place):
    """Commits a shard or a step of a stage in the making."""
    aside = root / place.replace("sh", ".sh").replace("step-", ".step-")
    aside.mkdir(parents=True)
    (aside / "rows.txt").write_text(place)
    return commit(aside, root / place, stage="part", key="key")


def flip(server, uri, name):
    """Changes one byte of an object; gives back both hashes."""
    path = f"/{uri.removeprefix('s3://')}/{name}"
    data = request(server, "GET", path)[1]
    flipped = bytes([data[0] ^ 1]) + data[1:]
    assert request(server, "PUT", path, flipped)[0] == 200
    return [hashlib.sha256(part).hexdigest() for part in (data, flipped)]


def test_committed_folder_is_uploaded_with_its_manifest_last_and_comes_back_byte_for_byte(proxy, at, place, tmp_path):
    made = make(tmp_path / "run")
    mirror(at(place), tmp_path / "run").sync()
    puts = [path.partition("pairs/")[2] for method, path in proxy.requests if method == "PUT" and "pairs/" in path]
    assert puts == [*sorted(made.files), MANIFEST]
    assert fetched(at(place), tmp_path / "fresh") == {PAIRS: made.identity}
    for name in (*made.files, MANIFEST):
        assert (tmp_path / "fresh" / PAIRS / name).read_bytes() == (made.folder / name).read_bytes()


def test_what_both_sides_hold_is_neither_uploaded_nor_fetched_again(proxy, at, place, tmp_path):
    made = make(tmp_path / "run")
    mirror(at(place), tmp_path / "run").sync()
    again = mirror(at(place), tmp_path / "run")
    proxy.requests.clear()
    times = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    again.restore(alone=True)
    again.sync()
    assert not [path for method, path in proxy.requests if method == "PUT"]
    assert not [path for method, path in proxy.requests if method == "GET" and path.endswith(".txt")]
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == times


def test_folder_without_a_manifest_is_not_committed(at, place, tmp_path):
    at(place).put(f"{PAIRS}/rows.txt", b"half")
    assert fetched(at(place), tmp_path / "fresh") == {}
    assert not (tmp_path / "fresh").exists(), "something is in the way of the stage"
    make(tmp_path / "run", text="whole")
    driver = mirror(at(place), tmp_path / "run")
    driver.restore(alone=False)
    driver.sync()
    assert list(fetched(at(place), tmp_path / "again")) == [PAIRS]
    assert (tmp_path / "again" / PAIRS / "rows.txt").read_text() == "whole"


class Died(BaseException):
    """The driver ends here: no `except Exception` of its own stops it."""


class Dying:
    """A client whose caller ends right before or right after one of its calls: call k has the numbers 2k and 2k + 1."""

    def __init__(self, client, number, verbs):
        self.client, self.number, self.verbs, self.count = client, number, verbs, 0

    def __getattr__(self, name):
        plain = getattr(self.client, name)

        def call(*given, **more):
            self.pass_by()
            try:
                return plain(*given, **more)
            finally:
                self.pass_by()

        return call if name in self.verbs else plain

    def pass_by(self):
        self.count += 1
        if self.count > self.number:
            raise Died


WRITES = ("pipe_file", "put_file", "rm_file")


def fresh_stage(root):
    """Nothing -> a committed stage."""
    yield
    make(root)


def fresh_shard(root):
    """Nothing -> one shard."""
    yield
    make_part(root, f"{SHARDS}/shard-0")


def stage_of_another_key(root):
    """A committed stage -> one of another key, the old one put aside."""
    make(root, key="old", text="old")
    yield
    Stage(root / PAIRS, "pairs", "new").put_aside()
    make(root, key="new", text="new")


def shards_then_their_stage(root):
    """Two shards of a stage in the making -> the stage."""
    make_part(root, f"{SHARDS}/shard-0")
    make_part(root, f"{SHARDS}/shard-1")
    yield
    work = root / SHARDS
    commit(work, root / "iteration-01/generations", stage="generations", key="key")


def die_at_each_call(store_at, folder, change, verbs):
    """Whether the new state had arrived, for each call at which a driver died; holds what each left against what may be there."""
    seen, alive = [], False
    while not alive:
        number = len(seen)
        root, store, dying = folder / str(number), store_at(number), store_at(number)
        steps = change(root)
        next(steps)
        driver = mirror(store, root)
        driver.sync()
        old = identities(root)
        assert list(steps) == []
        new = identities(root)
        dying.fs = Dying(store.fs, number, verbs)
        driver.store = driver.lease.store = dying
        with contextlib.suppress(Died):
            driver.sync()
            alive = True
        found = fetched(store, folder / f"found-{number}")
        assert set(found.items()) <= set(old.items()) | set(new.items())
        second = mirror(store, root)
        second.restore(alone=True)
        second.sync()
        assert fetched(store, folder / f"end-{number}") == new
        assert not [name for name in objects_of(store) if not name.startswith(tuple(new))]
        seen.append(found == new)
    assert seen[-1]
    return seen


@pytest.mark.parametrize(("change", "calls"), [(fresh_stage, 8), (stage_of_another_key, 30), (shards_then_their_stage, 15)])
def test_driver_that_dies_at_any_call_leaves_old_or_new_and_the_next_one_ends_what_it_began(at, place, tmp_path, change, calls):
    """In a store of this process, for there are many calls."""

    def memory(number):
        store = at(place)
        store.fs, store.root = fsspec.filesystem("memory"), f"/{tmp_path.name}-{change.__name__}/{number}"
        return store

    assert die_at_each_call(memory, tmp_path, change, (*WRITES, "find", "cat_file")).count(False) >= calls


@pytest.mark.slow
def test_driver_that_dies_at_any_write_to_a_server_leaves_all_or_nothing(at, place, tmp_path):
    seen = die_at_each_call(lambda number: at(f"{place}/{number}"), tmp_path, fresh_shard, WRITES)
    assert seen == [False] * 3 + [True] * 2  # a file and the manifest, before and after each, and no death


@pytest.mark.parametrize(("fault", "arrived"), [("cut", False), ("lost", True)])
@pytest.mark.slow
def test_process_killed_as_it_sends_a_manifest_has_committed_all_or_nothing(proxy, at, place, tmp_path, fault, arrived):
    """A real kill, from outside, before and after the server has the manifest."""
    made = make(tmp_path / "run")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            proxy.client.__init__("s3://bucket/any")  # a client does not survive a fork
            mirror(at(place), tmp_path / "run").sync()
        os._exit(1)  # the kill did not come

    def kill(method, path):
        if method == "PUT" and path.endswith(MANIFEST):
            proxy.before_hanging_up = lambda: os.kill(child, signal.SIGKILL)
            return fault
        return ""

    proxy.fault = kill
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    proxy.heal()
    assert fetched(at(place), tmp_path / "fresh") == ({PAIRS: made.identity} if arrived else {})
    mirror(at(place), tmp_path / "run").sync()
    assert fetched(at(place), tmp_path / "again") == {PAIRS: made.identity}


@pytest.mark.parametrize("fault", ["500", "cut", "lost", "half", "slow"])
@pytest.mark.slow
def test_every_request_may_fail_once_and_nothing_is_different(proxy, at, place, tmp_path, fault):
    failed = set()

    def first_time(method, path):
        once = (method, path.partition("?")[0])
        if once in failed or (fault == "slow" and not path.endswith((MANIFEST, "rows.txt"))):
            return ""
        failed.add(once)
        return fault

    made = make(tmp_path / "run")
    Run(tmp_path / "run").event("one")
    proxy.fault = first_time
    driver = mirror(at(place), tmp_path / "run")
    driver.sync()
    driver.lease.release()
    failed.clear()
    assert fetched(at(place), tmp_path / "fresh") == {PAIRS: made.identity}
    assert (tmp_path / "fresh/events.jsonl").read_bytes() == (tmp_path / "run/events.jsonl").read_bytes()
    assert set(proxy.fired) == {fault}
    assert len(proxy.fired) >= (4 if fault == "slow" else 10)


@pytest.mark.parametrize("fault", ["500", "cut"])
@pytest.mark.slow
def test_store_that_stays_out_of_order_ends_in_one_sentence_and_commits_nothing(proxy, at, place, tmp_path, fault):
    make(tmp_path / "run")
    driver = mirror(at(place, patience_s=0.5), tmp_path / "run")
    proxy.fault = lambda method, path: fault if method == "PUT" else ""
    with pytest.raises(ResourceError, match="submit the same command again") as caught:
        driver.sync()
    assert str(caught.value).startswith(f"{place}/{PAIRS}/part/deep.txt: the store did not answer")
    assert "\n" not in str(caught.value)
    proxy.heal()
    assert fetched(at(place), tmp_path / "fresh") == {}
    driver.sync()
    assert list(fetched(at(place), tmp_path / "later")) == [PAIRS]


def test_flipped_byte_in_the_store_is_named_with_both_hashes_and_fetched_by_nobody(server, at, place, tmp_path):
    make(tmp_path / "run")
    mirror(at(place), tmp_path / "run").sync()
    expected, actual = flip(server, place, f"{PAIRS}/part/deep.txt")
    with pytest.raises(IntegrityError) as caught:
        fetched(at(place), tmp_path / "fresh")
    told = (
        f"{place}/{PAIRS}/part/deep.txt: sha256 is {actual}, but its manifest says {expected}; delete {place}/{PAIRS}/{MANIFEST}"
    )
    assert str(caught.value).startswith(told)
    assert read_manifest(tmp_path / "fresh" / PAIRS) is None
    at(place).remove([f"{PAIRS}/{MANIFEST}"])  # the way out that it names
    mirror(at(place), tmp_path / "run").sync()
    assert list(fetched(at(place), tmp_path / "fresh")) == [PAIRS]


@pytest.mark.parametrize(
    ("name", "message"), [("rows.txt", "sha256 is missing, but"), (MANIFEST, "is damaged; delete that object")]
)
def test_object_that_is_gone_or_no_manifest_is_named(at, place, tmp_path, name, message):
    make(tmp_path / "run")
    mirror(at(place), tmp_path / "run").sync()
    at(place).put(f"{PAIRS}/{name}", b"{") if name == MANIFEST else at(place).remove([f"{PAIRS}/{name}"])
    with pytest.raises(IntegrityError) as caught:
        fetched(at(place), tmp_path / "fresh")
    assert str(caught.value).startswith(f"{place}/{PAIRS}/{name}: {message}")


def test_same_stage_from_another_driver_is_kept(at, place, tmp_path):
    theirs = make(tmp_path / "theirs")
    mirror(at(place), tmp_path / "theirs").sync()
    make(tmp_path / "run")
    mirror(at(place), tmp_path / "run").sync()
    assert fetched(at(place), tmp_path / "fresh") == {PAIRS: theirs.identity}


@pytest.mark.parametrize(("key", "text"), [("key", "other outcome"), ("other key", "rows")])
def test_other_bytes_or_inputs_from_another_driver_are_refused_and_theirs_count(at, place, tmp_path, key, text):
    theirs = make(tmp_path / "theirs")
    mirror(at(place), tmp_path / "theirs").sync()
    run = tmp_path / "run"
    make(run, key=key, text=text)
    what = "the same inputs with another result" if key == "key" else "other inputs"
    with pytest.raises(IntegrityError, match=f"another writer committed it meanwhile from {what}, and it was not changed"):
        mirror(at(place), run).sync()
    assert fetched(at(place), tmp_path / "fresh") == {PAIRS: theirs.identity}
    if key == "key":  # submitted again
        mirror(at(place), run).restore(alone=False)
        assert identities(run) == {PAIRS: theirs.identity}
    else:
        with pytest.raises(
            IntegrityError, match=rf"was made from other inputs or options than s3://.*; delete {run / PAIRS} and submit"
        ):
            mirror(at(place), run).restore(alone=False)


@pytest.mark.slow
def test_shards_and_steps_come_back_and_go_with_their_stage(at, place, tmp_path):
    root, other = tmp_path / "run", tmp_path / "other"
    driver = mirror(at(place), root)
    make_part(root, f"{SHARDS}/shard-0")
    make_part(root, f"{SHARDS}/shard-1")
    (root / SHARDS / ".shard-2").mkdir()
    (root / SHARDS / ".shard-2" / MANIFEST).write_text("{}")  # before its rename
    driver.sync()
    at(place).put(f"{SHARDS}/shard-3/rows.txt", b"an upload that was cut off")
    second = mirror(at(place), other)
    second.restore(alone=False)
    work = other / SHARDS
    assert sorted(path.name for path in work.iterdir()) == ["shard-0", "shard-1"]
    assert not [name for name in objects_of(at(place)) if "shard-3" in name]
    commit(work, work.with_name("generations"), stage="generations", key="key")
    second.sync()
    assert {Path(name).parts[1] for name in objects_of(at(place))} == {"generations"}
    third = mirror(at(place), root)  # on the first machine, whose shards are of no use any more
    third.restore(alone=False)
    third.sync()
    assert {Path(name).parts[1] for name in objects_of(at(place))} == {"generations"}


def test_step_that_is_replaced_while_it_is_uploaded_leaves_nothing(at, place, tmp_path):
    root, steps = tmp_path / "run", "iteration-01/.checkpoint-key/steps"
    made = make_part(root, f"{steps}/step-000002")
    driver = mirror(at(place), root)
    upload = driver.store.upload

    def replaced(name, path):
        shutil.rmtree(made.folder, ignore_errors=True)
        upload(name, path)

    driver.store.upload = replaced
    driver.store.put(f"{steps}/step-000002/other.txt", b"a part of it that had arrived")
    driver.sync()
    driver.store.upload = upload
    make_part(root, f"{steps}/step-000004")
    driver.sync()
    assert list(fetched(at(place), tmp_path / "fresh")) == [f"{steps}/step-000004"]
    assert not [name for name in objects_of(at(place)) if "step-000002" in name]


def test_only_stages_and_what_stands_in_the_working_folder_of_an_unfinished_one_are_committed():
    making = [
        ".scores-k/shard-0",
        ".evaluation-k/generations",
        ".evaluation-k/parallel/scores",
        ".evaluation-k/.scores-q/shard-7",
    ]
    places = ["pairs", "generations", ".superseded-pairs-k", ".checkpoint-k/steps/step-2", *making]
    unfinished = [".scores-k", ".scores-k/.shard-1", "half/generations", "half/shard-0", ".fetch-x/shard-1"]
    inner = ["generations/shard-0", ".evaluation-k/generations/shard-0", ".evaluation-k/scores/shard-0"]
    others = [*unfinished, *inner, ".generations-k/shard-0"]  # the last one's stage is committed
    names = [f"i/{name}/{MANIFEST}" for name in (*places, *others)]
    names += ["i/pairs/README.md", "i/pairs/odd", MANIFEST, "i/.x", "LOCK"]
    assert committed_places(names) == sorted(f"i/{name}" for name in places)


def test_files_below_the_name_of_a_stage_are_its_own():
    kept = ["iteration-01/pairs/README.md", "iteration-01/rejected.jsonl", "tensorboard/deep/x", "config.json"]
    other = ["iteration-01/pairs/odd", "iteration-01/scores/README.md", "iteration-01/scores/x/README.md", "iteration-01/.x/y",
             "iteration-01/.x", "LOCK", "LOCK/1", ".note", "iteration-01/.superseded-pairs-k/x"]  # fmt: skip
    assert loose_files([*kept, *other], ["iteration-01/pairs"]) == kept
