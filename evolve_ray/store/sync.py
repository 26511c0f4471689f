"""Keeps a run in an object store up to date while its driver works: takes the lock, downloads at the start, uploads commits."""

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from evolve_ray.errors import EvolveError, on_sigterm
from evolve_ray.store.files import write_atomic
from evolve_ray.store.mirror import Mirror
from evolve_ray.store.object_lock import Lease
from evolve_ray.store.object_store import Store
from evolve_ray.store.run import Run

NOTE = ".mirror.json"  # in the working copy: the lock number of the last driver that used it
POLL_S = 2.0
LOOSE_S = 30.0  # seconds between uploads of files outside of committed folders


@contextlib.contextmanager
def mirrored(uri: str, run: Run) -> Iterator[None]:
    """Holds the lock in the store, downloads what the folder lacks, and uploads in a thread what the block commits.

    At the end of the block everything is uploaded. An error in a thread stops the block with SIGTERM and is then raised here.
    """
    store = Store(uri)
    lease = Lease(store, run.root)
    previous = lease.take()
    errors: list[Exception] = []
    done = threading.Event()

    def fail(error: Exception) -> None:
        errors.append(error)
        while not done.wait(POLL_S):
            if signal.getsignal(signal.SIGTERM) is on_sigterm:  # while Ray starts, it has its own handler
                return os.kill(os.getpid(), signal.SIGTERM)

    mirror = Mirror(store, run.root, lease)
    note, content = run.root / NOTE, json.dumps({"uri": uri, "number": lease.number}).encode()
    thread = threading.Thread(target=follow, args=(mirror, done, fail), name="mirror in the object store", daemon=True)
    with lease.beating(fail):
        try:
            alone = read_note(note, uri) == {"uri": uri, "number": previous}
            if alone:
                write_atomic(note, content)
            mirror.restore(alone=alone)
            write_atomic(note, content)
            thread.start()
            yield
            done.set()
            thread.join()
            if errors:
                raise errors[0]
            mirror.sync()
            lease.release()
        except BaseException as error:
            done.set()
            if not errors and not isinstance(error, KeyboardInterrupt):  # after an interrupt the user waits for the end
                upload_rest(mirror, thread)
            store.patience_s = 5.0
            with contextlib.suppress(EvolveError):
                lease.release()
            if errors and isinstance(error, KeyboardInterrupt):
                raise errors[0] from None
            raise


def read_note(path: Path, uri: str) -> dict:
    """Returns the note of a working copy; without one, the lock number is 0, as before the first driver."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {"uri": uri, "number": 0}


def upload_rest(mirror: Mirror, thread: threading.Thread) -> None:
    """Uploads what is left after an error of the run; its own errors are dropped, because the user must see the run's error."""
    with contextlib.suppress(EvolveError):
        if thread.is_alive():
            thread.join()
        mirror.sync()


def follow(mirror: Mirror, done: threading.Event, fail: Callable[[Exception], None]) -> None:
    """Uploads after each event, because an event follows every commit; uploads loose files less often."""
    events, seen_size, loose_time = mirror.root / "events.jsonl", -1, time.monotonic()
    while not done.wait(POLL_S):
        size = events.stat().st_size if events.exists() else 0
        loose = time.monotonic() - loose_time > LOOSE_S
        if size == seen_size and not loose:
            continue
        try:
            mirror.sync(loose=loose)
        except Exception as error:  # an unexpected error also ends the driver, with its traceback
            return fail(error)
        seen_size, loose_time = size, time.monotonic() if loose else loose_time


@contextlib.contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """Downloads a run from an object store to a temporary folder, and checks each committed file against its manifest."""
    store = Store(uri)
    with tempfile.TemporaryDirectory(prefix="evolve-ray-") as folder:
        Mirror(store, Path(folder), Lease(store, Path(folder))).fetch_all(alone=False)
        yield Path(folder)
