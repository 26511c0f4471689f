"""Ends a driver whose Ray is lost, with a sentence; Ray itself aborts without one.

It does so a minute after it has lost its head, and at the driver's next use of a raylet that is gone.
"""

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
        end(f"the head node at {self.address} is lost: no answer for {FAILURES * TICK_S:.0f} s")


class RayletWatch(HeadWatch):
    """A thread that holds a connection to the raylet of the driver's own node: it breaks in the moment in which that ends."""

    def __init__(self, address: str, head: HeadWatch):
        self.head = head
        super().__init__(address)

    def _watch(self) -> None:
        host, _, port = self.address.rpartition(":")
        refused = 0
        while not self._done.wait(0.05):
            try:
                with socket.create_connection((host.strip("[]"), int(port)), timeout=TICK_S) as held:
                    refused = 0
                    self._hold(held)
            except ConnectionRefusedError:  # by our own machine: nobody listens there any more
                refused += 1
                if refused == 2 and not self._done.is_set():
                    self.end()
            except OSError:
                pass  # a machine too busy to answer

    def _hold(self, held: socket.socket) -> None:
        """Until the other side closes, which a raylet also does now and then."""
        while not self._done.is_set():
            try:
                if not held.recv(4096):
                    return
            except TimeoutError:
                pass

    def end(self) -> None:
        if self.head.answers():
            end(f"the raylet of this node at {self.address} is gone, and with it all that ran here")
        else:
            end(f"the head node at {self.head.address} is lost, and the raylet of this node with it")


def end(what: str) -> None:
    """Nothing can be asked of Ray any more, so the process ends at once; what is committed stays."""
    print(
        f"error: ray: {what}; when a cluster is there again, submit the same command again: it continues from what is committed",
        file=sys.stderr,
        flush=True,
    )
    os._exit(ResourceError.exit_code)
