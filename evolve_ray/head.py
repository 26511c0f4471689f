"""Ends a driver whose Ray head is lost: Ray itself waits a minute for it, then aborts without a sentence."""

import os
import socket
import sys
import threading

from evolve_ray.errors import ResourceError

TICK_S = 3.0
FAILURES = 10  # in a row, so that a driver that was asleep itself does not take that for its head's death


class HeadWatch:
    """A thread that connects to the head's port again and again."""

    def __init__(self, address: str):
        self.address = address
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        self._done.set()

    def answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=TICK_S).close()
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        failed = 0
        while not self._done.wait(TICK_S):
            failed = 0 if self.answers() else failed + 1
            if failed == FAILURES:
                self.end()

    def end(self) -> None:
        """Nothing can be asked of Ray any more, so the process ends at once; what is committed stays."""
        print(
            f"error: ray: the head node at {self.address} is lost: no answer for {FAILURES * TICK_S:.0f} s; when a cluster is "
            "there again, submit the same command again: it continues from what is committed",
            file=sys.stderr,
            flush=True,
        )
        os._exit(ResourceError.exit_code)
