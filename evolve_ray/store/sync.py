"""A run in an object store while its driver works: its lock, what is fetched at the start, what is uploaded on the way."""

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

NOTE = ".mirror.json"  # in the working copy: the number of the lock that its last driver held
POLL_S = 2.0
LOOSE_S = 30.0  # how old files outside of committed folders may get in the store while nothing else is uploaded


@contextlib.contextmanager
def kept(uri: str, run: Run) -> Iterator[None]:
    """Holds the lock in the store, fetches, and uploads in a thread what the block commits; at its end all is uploaded.

    A fault of the thread ends the driver as SIGTERM does, and then comes out here as what it is.
    """
    store = Store(uri)
    lease = Lease(store, run.root)
    before = lease.take()
    faults: list[Exception] = []
    done = threading.Event()

    def fail(error: Exception) -> None:
        faults.append(error)
        while not done.wait(POLL_S):
            if signal.getsignal(signal.SIGTERM) is on_sigterm:  # not while Ray starts, which has a handler of its own
                return os.kill(os.getpid(), signal.SIGTERM)

    mirror = Mirror(store, run.root, lease)
    note, own = run.root / NOTE, json.dumps({"uri": uri, "number": lease.number}).encode()
    thread = threading.Thread(target=follow, args=(mirror, done, fail), name="mirror in the object store", daemon=True)
    with lease.beating(fail):
        try:
            alone = read_note(note, uri) == {"uri": uri, "number": before}
            if alone:
                write_atomic(note, own)
            mirror.restore(alone=alone)
            write_atomic(note, own)
            thread.start()
            yield
            done.set()
            thread.join()
            if faults:
                raise faults[0]
            mirror.sync()
            lease.release()
        except BaseException as error:
            done.set()
            if not faults and not isinstance(error, KeyboardInterrupt):  # then somebody waits for the end of this
                settle(mirror, thread)
            store.patience_s = 5.0
            with contextlib.suppress(EvolveError):
                lease.release()
            if faults and isinstance(error, KeyboardInterrupt):
                raise faults[0] from None
            raise


def read_note(path: Path, uri: str) -> dict:
    """The note of a working copy; one that is not there says that nobody has used the store yet."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {"uri": uri, "number": 0}


def settle(mirror: Mirror, thread: threading.Thread) -> None:
    """After a fault of the run: the store gets what there is, if it can; the fault of the run is what the user is told."""
    with contextlib.suppress(EvolveError):
        if thread.is_alive():
            thread.join()
        mirror.sync()


def follow(mirror: Mirror, done: threading.Event, fail: Callable[[Exception], None]) -> None:
    """Uploads after each event, since every commit is followed by one; loose files less often."""
    events, seen, sent = mirror.root / "events.jsonl", -1, time.monotonic()
    while not done.wait(POLL_S):
        size = events.stat().st_size if events.exists() else 0
        loose = time.monotonic() - sent > LOOSE_S
        if size == seen and not loose:
            continue
        try:
            mirror.sync(loose=loose)
        except Exception as error:  # what nobody knows ends the driver too, with its traceback
            return fail(error)
        seen, sent = size, time.monotonic() if loose else sent


@contextlib.contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """A run of an object store in a temporary folder, each committed file held against its manifest on the way."""
    store = Store(uri)
    with tempfile.TemporaryDirectory(prefix="evolve-ray-") as folder:
        Mirror(store, Path(folder), Lease(store, Path(folder))).fetch_all(alone=False)
        yield Path(folder)
