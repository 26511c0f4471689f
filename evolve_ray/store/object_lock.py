"""The lock of a run in an object store: who works there, with a heartbeat, and taken over from a driver that lost its own."""

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
STALE_S = 300.0  # a lock without a heartbeat for so long is taken over


class Lease:
    """The lock of a run in a store: the object with the highest number under LOCK/, each written only if it is not there.

    Numbers only grow, so whoever takes over from a driver that only slept is seen by it before its next manifest.
    """

    def __init__(self, store: Store, folder: Path, beat_s: float = BEAT_S, stale_s: float = STALE_S):
        self.store, self.folder, self.beat_s, self.stale_s = store, folder, beat_s, stale_s
        self.number, self.beaten, self.checked, self.writing = 0, 0.0, 0.0, threading.Lock()
        self.own: dict[str, Any] = {
            "host": socket.gethostname(), "pid": os.getpid(), "job": submission_id(), "start": now(), "folder": str(folder),
            "boot": boot_id(), "released": False,
        }  # fmt: skip

    def name(self, number: int) -> str:
        return f"LOCK/{number:06d}.json"

    def numbers(self) -> list[int]:
        return [int(name[5:11]) for name in self.store.names("LOCK") if re.fullmatch(r"LOCK/\d{6}\.json", name)]

    def record(self) -> bytes:
        return json.dumps({**self.own, "beat": time.time()}, indent=1).encode()

    def take(self) -> int:
        """The number of the holder before, 0 if there was none; LockedError names a holder that may be alive.

        The driver has the lock of its folder already: a holder in the same folder on the same machine is dead.
        """
        before = max(self.numbers(), default=0)
        held = self.store.read(self.name(before)) if before else None
        if held is not None:
            holder = self.parse(before, held)
            here = all(holder.get(name) == self.own[name] for name in ("host", "boot", "folder"))
            if not holder["released"] and not here and time.time() - holder["beat"] < self.stale_s:
                raise self.locked(held)
        data = self.record()
        held = self.store.put_new(self.name(before + 1), data)
        if held != data:
            raise self.locked(held)
        self.number, self.beaten = before + 1, time.monotonic()
        self.store.remove([self.name(number) for number in self.numbers() if number < self.number])
        return before

    def parse(self, number: int, data: bytes) -> dict[str, Any]:
        try:
            holder = json.loads(data)
            return {**holder, "beat": float(holder["beat"]), "released": bool(holder["released"])}
        except (ValueError, KeyError, TypeError):
            where = f"{self.store.uri}/{self.name(number)}"
            raise IntegrityError(f"{where}: is damaged; delete it if no driver works on this run, then submit again") from None

    def locked(self, held: bytes) -> LockedError:
        holder = " ".join(held.decode("utf-8", "replace").split())
        return LockedError(
            f"{self.store.uri}: another driver works on this run: {holder}; wait for it or end it; if it is dead, submit again "
            f"{self.stale_s:g} s after its last `beat`"
        )

    def check(self, within_s: float = 0.0) -> None:
        """LockedError if somebody took over, or might have: no heartbeat arrived for as long as makes a lock stale.

        An answer of the last `within_s` seconds will do.
        """
        if time.monotonic() - self.checked < within_s:
            return
        last = max(self.numbers(), default=self.number)
        if last != self.number:
            raise self.locked(self.store.read(self.name(last)) or b"an unnamed process")
        if time.monotonic() - self.beaten > self.stale_s:
            raise LockedError(
                f"{self.store.uri}: this driver was out of touch for {self.stale_s:g} s; submit the same command again"
            )
        self.checked = time.monotonic()

    def beat(self) -> None:
        self.check()
        with self.writing:
            started = time.monotonic()
            self.store.put(self.name(self.number), self.record())
            self.beaten = started

    def release(self) -> None:
        """The next driver need not wait. A heartbeat that comes later says so too."""
        self.own["released"] = True
        with self.writing:
            self.store.put(self.name(self.number), self.record())

    @contextlib.contextmanager
    def beating(self, fail: Callable[[Exception], None]) -> Iterator[None]:
        """Heartbeats until the block ends; `fail` is told, once, when the lock is lost or the store stays away."""
        done = threading.Event()

        def work() -> None:
            while not done.wait(self.beat_s):
                try:
                    self.beat()
                except Exception as error:
                    return fail(error)

        thread = threading.Thread(target=work, name="lock of the object store", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(1.0)


def boot_id() -> str:
    """This start of this machine's kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
