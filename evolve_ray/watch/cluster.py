"""Ends a driver whose Ray is lost, with a sentence; Ray itself aborts without one.

It does so a minute after it has lost its head, and at the driver's next use of a raylet that is gone.
"""

import contextlib
import os
import re
import select
import socket
import sys
import threading

import psutil

from evolve_ray.errors import ResourceError

TICK_S = 3.0
FAILURES = 10  # in a row, so that a driver that was asleep itself does not take that for its head's death
AGENT = re.compile(r"dashboard/agent\.py|runtime_env/agent/main\.py|ray::(Dashboard|RuntimeEnv)Agent")  # as a title tells them


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
    """A thread that waits for the end of the raylet of the driver's own node, or of an agent of it, with which it ends.

    Ray aborts a driver some milliseconds after that. A raylet whose process is not seen from here is not watched.
    """

    def __init__(self, address: str, socket_name: str, head: HeadWatch):
        self.head, self.socket_name = head, socket_name
        super().__init__(address)

    def _watch(self) -> None:
        ends, files = select.poll(), []
        with contextlib.suppress(OSError, psutil.Error):  # gone already, or not to be watched here
            for pid in fate_of(self.socket_name):
                files.append(os.pidfd_open(pid))
                ends.register(files[-1], select.POLLIN)
        while files and not self._done.is_set():
            if ends.poll(TICK_S * 1000) and not self._done.is_set():
                self.end()
                break
        for file in files:
            os.close(file)

    def end(self) -> None:
        if self.head.answers():
            end(f"the raylet of this node at {self.address} is gone, and with it all that ran here")
        else:
            end(f"the head node at {self.head.address} is lost, and the raylet of this node with it")


def fate_of(socket_name: str) -> list[int]:
    """The processes of this machine with whose end that raylet is gone: its own, and its two agents."""
    for process in psutil.process_iter(["cmdline"]):
        if f"--raylet_socket_name={socket_name}" in (process.info["cmdline"] or ()):
            return [process.pid, *(child.pid for child in process.children() if AGENT.search(title(child)))]
    return []


def title(process: psutil.Process) -> str:
    """What a process calls itself; "" where it is gone: workers of a busy node come and go."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def end(what: str) -> None:
    """Nothing can be asked of Ray any more, so the process ends at once; what is committed stays."""
    print(
        f"error: ray: {what}; when a cluster is there again, submit the same command again: it continues from what is committed",
        file=sys.stderr,
        flush=True,
    )
    os._exit(ResourceError.exit_code)
