"""A driver and its run in an object store: one at a time, what is uploaded when, and what it says when the store fails it."""

import contextlib
import json
import signal
import sys
import threading
import time

import pytest

from evolve_ray.audit import verify
from evolve_ray.driver import main
from evolve_ray.errors import IntegrityError, LockedError, ResourceError, UserError, on_sigterm
from evolve_ray.store import sync
from evolve_ray.store.manifest import MANIFEST
from evolve_ray.store.mirror import files_of
from evolve_ray.store.object_lock import Lease
from evolve_ray.store.object_store import Store
from evolve_ray.store.places import check_uri, is_uri, places, run_folder
from evolve_ray.store.run import Run
from evolve_ray.store.sync import mirrored
from evolve_ray.watch import status
from tests.plain.audit.test_verify import run as sound_run
from tests.plain.processes import run_python
from tests.stores import CREDENTIALS, at, fetched, make, mirror, objects_of, place, proxy, request, server, way

pytestmark = pytest.mark.long  # a minute and a half of drivers

__all__ = ["at", "place", "proxy", "server", "sound_run", "way"]


@pytest.fixture
def quick(at, monkeypatch):
    """`mirrored` with the shared client, short patience, and a look at the run every tenth of a second."""
    monkeypatch.setattr(sync, "Store", lambda uri: at(uri, patience_s=0.5))
    monkeypatch.setattr(sync, "POLL_S", 0.1)
    before = signal.signal(signal.SIGTERM, on_sigterm)
    yield
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def working(uri, run):
    """What a driver holds while it works."""
    with run.locked(), mirrored(uri, run):
        yield


def lease(store, folder, **own):
    """The lock as a driver of another host sees it; `own` says what it writes of itself."""
    found = Lease(store, folder)
    found.holder |= {"host": "elsewhere"} | own
    return found


def wait_until(found, seconds=20.0):
    ends = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.05)


def test_second_driver_is_told_who_holds_the_lock(at, place, tmp_path):
    first = lease(at(place), tmp_path, pid=4711, job="raysubmit_1")
    first.take()
    with pytest.raises(
        LockedError, match=r'another driver works on this run: \{ "host": "elsewhere", "pid": 4711, "job": "raysubmit_1"'
    ):
        Lease(at(place), tmp_path).take()
    first.check()
    first.release()
    assert Lease(at(place), tmp_path).take() == 1


def test_lock_without_a_heartbeat_is_taken_over_and_its_holder_finds_out_before_it_writes(proxy, at, place, tmp_path):
    make(tmp_path / "run")
    sleeper = mirror(at(place), tmp_path / "run")
    sleeper.lease.holder["host"] = "elsewhere"
    sleeper.lease.beat()
    second = Lease(at(place), tmp_path)
    with pytest.raises(LockedError):
        second.take()
    second.stale_s = 0.0
    assert second.take() == 1
    sleeper.lease.last_check -= 60.0  # it slept
    proxy.requests.clear()
    for act in (sleeper.sync, sleeper.lease.beat, lambda: sleeper.withdraw("iteration-01/pairs")):
        with pytest.raises(LockedError, match="another driver works on this run"):
            act()
    assert not [request for request in proxy.requests if request[0] in ("PUT", "DELETE")]


def test_holder_that_died_in_the_same_folder_of_the_same_machine_is_followed_at_once(at, place, tmp_path):
    Lease(at(place), tmp_path).take()  # and died: the kernel has freed the lock of the folder
    assert Lease(at(place), tmp_path).take() == 1
    with pytest.raises(LockedError):
        Lease(at(place), tmp_path / "elsewhere").take()


def test_of_drivers_that_start_at_once_one_gets_the_lock(at, place, tmp_path):
    drivers = [lease(at(place), tmp_path, host=f"host-{number}") for number in range(4)]
    start, won, lost = threading.Barrier(4), [], []

    def take(one):
        start.wait()
        try:
            won.append(one.take())
        except LockedError:
            lost.append(one)

    threads = [threading.Thread(target=take, args=(one,)) for one in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (won, len(lost)) == ([0], 3)


def test_driver_that_was_out_of_touch_for_too_long_writes_nothing_more(at, place, tmp_path):
    driver = mirror(at(place), tmp_path)
    driver.lease.last_beat -= 61.0
    with pytest.raises(LockedError, match="sent no heartbeat for 60 s"):
        driver.lease.check()


def test_damaged_lock_is_named(at, place, tmp_path):
    at(place).put("LOCK/000001.json", b"{}")
    with pytest.raises(IntegrityError, match=r"LOCK/000001\.json: is damaged; delete it if no driver works on this run"):
        Lease(at(place), tmp_path).take()


def test_heartbeats_say_that_the_driver_lives(at, place, tmp_path):
    one = Lease(at(place), tmp_path, beat_s=0.05)
    one.take()
    first = json.loads(at(place).read("LOCK/000001.json"))["beat"]
    with one.beating(lambda error: pytest.fail(str(error))):
        wait_until(lambda: json.loads(at(place).read("LOCK/000001.json"))["beat"] > first)


def test_what_a_driver_commits_is_in_the_store_while_it_works_and_all_of_it_at_the_end(quick, at, place, tmp_path):
    run = Run(tmp_path / "run")
    with working(place, run):
        made = make(run.root)
        run.event("stage_end", stage="pairs")
        wait_until(lambda: f"iteration-01/pairs/{MANIFEST}" in objects_of(at(place)))
        run.event("driver_end")
    assert fetched(at(place), tmp_path / "fresh") == {"iteration-01/pairs": made.identity}
    assert (tmp_path / "fresh/events.jsonl").read_bytes() == (run.root / "events.jsonl").read_bytes()
    assert json.loads(at(place).read("LOCK/000001.json"))["released"]


def test_run_goes_on_elsewhere_and_comes_back(quick, at, place, tmp_path):
    here, there = Run(tmp_path / "here"), Run(tmp_path / "there")
    for number, one in enumerate((here, there, there, here)):
        with working(place, one):
            events = one.root / "events.jsonl"
            seen = [json.loads(line)["number"] for line in events.read_text().splitlines()] if number else []
            assert seen == list(range(number))
            one.event("worked", number=number)


def work(uri, run, *steps):
    """A driver that commits a stage, takes some steps, and waits for its end."""
    with working(uri, run):
        for step in steps:
            step()
        make(run.root)
        run.event("stage_end", stage="pairs")
        time.sleep(30)
        pytest.fail("nobody ended it")


def test_fault_of_the_run_comes_out_as_it_is_with_everything_uploaded_and_the_lock_free(quick, at, place, tmp_path):
    def fault():
        make(tmp_path / "run", "iteration-01/prompts")
        raise UserError("no pairs")

    with pytest.raises(UserError, match="no pairs"):
        work(place, Run(tmp_path / "run"), fault)
    assert f"iteration-01/prompts/{MANIFEST}" in objects_of(at(place))
    assert json.loads(at(place).read("LOCK/000001.json"))["released"]


def test_store_that_fails_while_the_run_works_ends_it_soon_with_one_sentence(quick, proxy, at, place, tmp_path):
    def fail():
        proxy.fault = lambda method, path: "500" if method == "PUT" else ""

    with pytest.raises(ResourceError, match=r"iteration-01/pairs/part/deep\.txt: the store did not answer"):
        work(place, Run(tmp_path / "run"), fail)
    proxy.heal()
    with working(place, Run(tmp_path / "run")):  # submitted again: what is committed on the disk stays
        pass
    assert list(fetched(at(place), tmp_path / "fresh")) == ["iteration-01/pairs"]


def test_driver_whose_lock_was_taken_ends_soon(quick, at, place, tmp_path):
    with pytest.raises(LockedError, match="taker"):
        work(place, Run(tmp_path / "run"), lambda: at(place).put("LOCK/000002.json", b'{"host": "taker"}'))
    assert not [name for name in objects_of(at(place)) if "pairs" in name]


def test_files_without_a_manifest_follow_whoever_worked_last(at, place, tmp_path):
    root, other = tmp_path / "run", tmp_path / "other"
    committed = make(root, "iteration-01/checkpoint")
    texts = {"events.jsonl": "one\nhalf a li", "report.json": "{}", "tensorboard/x": "x", "iteration-01/rejected.jsonl": "",
             "iteration-01/checkpoint/README.md": "card"}  # fmt: skip
    for name, text in (texts | {"LOCK": "me", ".note": ""}).items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    mirror(at(place), root).sync()
    stage = {f"iteration-01/checkpoint/{name}" for name in (*committed.files, MANIFEST)}
    assert set(objects_of(at(place))) - stage == set(texts)
    mirror(at(place), other).restore(alone=False)
    assert {name: (other / name).read_text() for name in texts} == texts | {"events.jsonl": "one\n"}
    (root / "report.json").write_text("younger")
    again = mirror(at(place), root)
    again.restore(alone=True)
    assert (root / "report.json").read_text() == "younger"
    (root / "tensorboard/x").rename(root / "tensorboard/y")
    again.sync(loose=False)
    assert "tensorboard/x" in objects_of(at(place))
    again.sync()
    assert [name for name in objects_of(at(place)) if "tensorboard" in name] == ["tensorboard/y"]
    at(place).put("report.json", b"{}")
    mirror(at(place), root).restore(alone=False)
    assert (root / "report.json").read_text() == "{}"


def test_credentials_that_are_refused_are_a_fault_of_the_user_at_once(proxy, at, place, tmp_path):
    proxy.fault = lambda method, path: "403"
    with pytest.raises(UserError, match="the store refuses access: PermissionError") as caught:
        mirror(at(place, patience_s=600), tmp_path)
    assert "canary" not in str(caught.value)


def test_no_credential_gets_into_the_run_or_the_store(quick, proxy, at, place, tmp_path):
    run = Run(tmp_path / "run")

    def fail():
        proxy.fault = lambda method, path: "cut" if "deep" in path else ""

    with pytest.raises(ResourceError) as caught:
        work(place, run, fail)
    proxy.heal()
    with working(place, run):
        run.event("driver_failed", error=str(caught.value), command=f"--run {place}")
    written = [at(place).read(name) for name in at(place).names()] + [
        (run.root / name).read_bytes() for name in files_of(run.root)
    ]
    assert b"driver_failed" in b"".join(written)
    assert not [secret for secret in list(CREDENTIALS.values())[:2] if secret.encode() in b"".join(written)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket", "must name a bucket and a prefix without . or ..; give s3://BUCKET/PREFIX"),
        ("s3:///prefix", "must name a bucket and a prefix without . or .."),
        ("s3://bucket/../x", "must name a bucket and a prefix without . or .."),
        ("s3://key:secret@bucket/run", "must hold no credentials"),
        ("s3://bucket/run?token=secret", "must hold no credentials"),
        ("ftp://host/run", "ftp:// is not supported; give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"),
    ],
)
def test_uri_that_cannot_hold_a_run_is_refused(name, message):
    with pytest.raises(UserError, match=message) as caught:
        check_uri(name)
    assert "secret" not in str(caught.value)


def test_uri_names_a_folder_for_its_working_copy():
    assert check_uri("s3://bucket/a//b/") == ("s3://bucket/a/b", "s3/bucket/a/b")
    assert places("s3://bucket/a", None) == (run_folder("runs/s3/bucket/a"), "s3://bucket/a")
    assert places("s3://bucket/a", "/shared/a") == (run_folder("/shared/a"), "s3://bucket/a")
    with pytest.raises(UserError, match="--work /shared/a: is only for runs in an object store"):
        places("runs/a", "/shared/a")


@pytest.mark.parametrize(("uri", "package"), [("s3://bucket/run", "s3fs"), ("gs://bucket/run", "gcsfs")])
def test_package_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch, uri, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{uri}: needs the package {package}; run: pip install "):
        Store(uri)


def test_client_as_it_is_configured_waits_out_a_store_that_fails(proxy, monkeypatch, place):
    monkeypatch.undo()
    failing = iter(["500", "cut", "500"])
    proxy.fault = lambda method, path: next(failing, "")
    plain = Store(place)
    plain.put("x", b"data")
    assert plain.read("x") == b"data"
    assert proxy.fired == ["500", "cut", "500"]


def test_driver_ends_with_exit_code_three_where_another_one_works_and_two_where_no_bucket_is(
    quick, at, place, tmp_path, recipe, capsys
):
    lease(at(place), tmp_path, pid=4711).take()
    assert main([str(recipe()), "--run", place, "--work", str(tmp_path / "work")]) == 3
    assert main([str(recipe()), "--run", "s3://nowhere/run", "--work", str(tmp_path / "work")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert ("4711" in said[0], len(said)) == (True, 2)
    assert said[1].startswith("error: s3://nowhere/run: the bucket does not exist")
    assert not (tmp_path / "work/events.jsonl").exists()


def test_verify_fetches_a_run_and_says_whether_it_is_sound(quick, server, at, place, sound_run, capsys):
    mirror(at(place), sound_run).sync()
    assert verify.main([place]) == 0
    said = capsys.readouterr()
    assert f"run in {place}" in said.out
    assert "no errors; the run is complete" in said.out
    path = f"/{place.removeprefix('s3://')}/iteration-01/pairs/pairs.parquet"
    assert request(server, "PUT", path, b"other")[0] == 200
    assert verify.main([place]) == 4
    assert f"error: {place}/iteration-01/pairs/pairs.parquet: sha256 is" in capsys.readouterr().err


def test_command_that_reads_a_folder_refuses_a_uri_by_name(capsys):
    with pytest.raises(SystemExit) as caught:
        status.main(["s3://bucket/run"])
    assert caught.value.code == 2
    assert "s3://bucket/run is in an object store; give the folder that the run works in" in capsys.readouterr().err


def test_clients_are_loaded_only_for_a_run_in_an_object_store():
    names = ("fsspec", "s3fs", "botocore")
    loaded = run_python(f"import sys; from evolve_ray import driver; print([name for name in {names} if name in sys.modules])")
    assert loaded == "[]\n"


def test_uri_is_no_folder():
    assert is_uri("file:///a") is False
    with pytest.raises(UserError, match="gs://a/b: is in an object store; give a folder"):
        run_folder("gs://a/b")
