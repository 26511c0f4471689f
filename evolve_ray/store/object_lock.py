"""The lock of a run in an object store: it names the driver, has a heartbeat, and is taken over when the heartbeat stops."""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evolve_ray.errors import IntegrityError, LockedError
from evolve_ray.store.object_store import Store
from evolve_ray.store.run import now, submission_id

BEAT_S = 20.0
STALE_S = 300.0  # a lock without a heartbeat for this long is taken over


class Lease:
    """The lock of a run in a store: the object with the highest number under LOCK/.

    A driver writes a lock object only if none of that number exists. Numbers only grow, so a driver that was suspended sees
    before its next manifest that another driver has taken over.
    """

    def __init__(self, store: Store, folder: Path, beat_s: float = BEAT_S, stale_s: float = STALE_S):
        self.store, self.folder, self.beat_s, self.stale_s = store, folder, beat_s, stale_s
        self.number, self.last_beat, self.last_check, self.writing = 0, 0.0, 0.0, threading.Lock()
        self.holder: dict[str, Any] = {
            "host": socket.gethostname(), "pid": os.getpid(), "job": submission_id(), "start": now(), "folder": str(folder),
            "boot": boot_id(), "released": False,
        }  # fmt: skip

    def name(self, number: int) -> str:
        return f"LOCK/{number:06d}.json"

    def numbers(self) -> list[int]:
        """Returns the numbers of all lock objects in the store."""
        return [int(name[5:11]) for name in self.store.names("LOCK") if re.fullmatch(r"LOCK/\d{6}\.json", name)]

    def record(self) -> bytes:
        """Returns the content of the lock object, with the time of this heartbeat."""
        return json.dumps({**self.holder, "beat": time.time()}, indent=1).encode()

    def take(self) -> int:
        """Takes the lock; returns the number of the previous lock, 0 if there was none. LockedError names a holder that may be
        alive.

        This driver already has the lock of its folder, so a holder in the same folder on the same machine is dead.
        """
        previous = max(self.numbers(), default=0)
        stored = self.store.read(self.name(previous)) if previous else None
        if stored is not None:
            holder = self.parse(previous, stored)
            same_folder = all(holder.get(name) == self.holder[name] for name in ("host", "boot", "folder"))
            if not holder["released"] and not same_folder and time.time() - holder["beat"] < self.stale_s:
                raise self.locked(stored)
        data = self.record()
        stored = self.store.put_if_absent(self.name(previous + 1), data)
        if stored != data:
            raise self.locked(stored)
        self.number, self.last_beat = previous + 1, time.monotonic()
        self.store.remove([self.name(number) for number in self.numbers() if number < self.number])
        return previous

    def parse(self, number: int, data: bytes) -> dict[str, Any]:
        """Returns the holder in the bytes of a lock object; IntegrityError if they are damaged."""
        try:
            holder = json.loads(data)
            return {**holder, "beat": float(holder["beat"]), "released": bool(holder["released"])}
        except (ValueError, KeyError, TypeError):
            where = f"{self.store.uri}/{self.name(number)}"
            raise IntegrityError(
                f"{where}: is damaged; delete it if no driver works on this run, then submit the same command again"
            ) from None

    def locked(self, record: bytes) -> LockedError:
        """Returns the error that names the holder in the lock object with the bytes `record`."""
        holder = " ".join(record.decode("utf-8", "replace").split())
        return LockedError(
            f"{self.store.uri}: another driver works on this run: {holder}; wait for it or stop it; if it is dead, submit the "
            f"same command again {self.stale_s:g} s after its last `beat`"
        )

    def check(self, within_s: float = 0.0) -> None:
        """Raises LockedError if another driver took over the lock, or could have because it had no heartbeat for `stale_s`.

        Asks the store only if the last check is older than `within_s` seconds.
        """
        if time.monotonic() - self.last_check < within_s:
            return
        last = max(self.numbers(), default=self.number)
        if last != self.number:
            raise self.locked(self.store.read(self.name(last)) or b"an unknown process")
        if time.monotonic() - self.last_beat > self.stale_s:
            raise LockedError(
                f"{self.store.uri}: this driver sent no heartbeat for {self.stale_s:g} s, so another driver may have taken over; "
                "submit the same command again"
            )
        self.last_check = time.monotonic()

    def beat(self) -> None:
        """Writes a heartbeat; LockedError as in `check`."""
        self.check()
        with self.writing:
            started = time.monotonic()
            self.store.put(self.name(self.number), self.record())
            self.last_beat = started

    def release(self) -> None:
        """Marks the lock as released, so that the next driver need not wait; a later heartbeat keeps the mark."""
        self.holder["released"] = True
        with self.writing:
            self.store.put(self.name(self.number), self.record())

    @contextlib.contextmanager
    def beating(self, fail: Callable[[Exception], None]) -> Iterator[None]:
        """Writes heartbeats until the block ends; calls `fail` once if the lock is lost or the store does not answer."""
        done = threading.Event()

        def keep_beating() -> None:
            while not done.wait(self.beat_s):
                try:
                    self.beat()
                except Exception as error:
                    return fail(error)

        thread = threading.Thread(target=keep_beating, name="lock of the object store", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(1.0)


def boot_id() -> str:
    """Returns the id of the current boot of this machine, "" if the kernel gives none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
