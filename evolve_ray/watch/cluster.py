"""Ends a driver that has lost its Ray cluster, with a clear error.

Without this, Ray aborts the process without one: a minute after it has lost the head node, or at the driver's next call after the
raylet of its node has died.
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
FAILURES = 10  # failures in a row: a driver that was suspended itself must not conclude that the head node is dead
AGENT = re.compile(r"dashboard/agent\.py|runtime_env/agent/main\.py|ray::(Dashboard|RuntimeEnv)Agent")  # in a process title


class HeadWatch:
    """A thread that connects to the port of the head node every `TICK_S` seconds, and ends the process if that keeps failing."""

    def __init__(self, address: str):
        self.address = address
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        self._done.set()

    def answers(self) -> bool:
        """Whether the head node accepts a connection."""
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
        """Ends the process with the reason on stderr."""
        exit_process(f"the head node at {self.address} is lost: no answer for {FAILURES * TICK_S:.0f} s")


class RayletWatch(HeadWatch):
    """A thread that ends the process when the raylet of this node, or one of its agents, ends; a raylet ends with its agents.

    Ray would abort the driver some milliseconds later. A raylet whose process is not visible from here is not watched.
    """

    def __init__(self, address: str, socket_name: str, head: HeadWatch):
        self.head, self.socket_name = head, socket_name
        super().__init__(address)

    def _watch(self) -> None:
        poll, files = select.poll(), []
        with contextlib.suppress(OSError, psutil.Error):  # a process has ended already, or may not be watched
            for pid in raylet_processes(self.socket_name):
                files.append(os.pidfd_open(pid))
                poll.register(files[-1], select.POLLIN)
        while files and not self._done.is_set():
            if poll.poll(TICK_S * 1000) and not self._done.is_set():
                self.end()
                break
        for file in files:
            os.close(file)

    def end(self) -> None:
        if self.head.answers():
            exit_process(f"the raylet of this node at {self.address} is gone, with all processes that it ran on this node")
        else:
            exit_process(f"the head node at {self.head.address} is lost, and the raylet of this node too")


def raylet_processes(socket_name: str) -> list[int]:
    """Returns the process ids of a raylet and its two agents, [] if it is not visible; if one of these ends, the raylet ends."""
    for process in psutil.process_iter(["cmdline"]):
        if f"--raylet_socket_name={socket_name}" in (process.info["cmdline"] or ()):
            return [process.pid, *(child.pid for child in process.children() if AGENT.search(title(child)))]
    return []


def title(process: psutil.Process) -> str:
    """Returns the command line of a process, "" if it has ended: workers of a busy node start and end all the time."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def exit_process(reason: str) -> None:
    """Prints the reason and ends the process at once, because no call to Ray would return; committed work is kept."""
    print(
        f"error: ray: {reason}; when the cluster is up again, submit the same command again: it resumes from the committed work",
        file=sys.stderr,
        flush=True,
    )
    os._exit(ResourceError.exit_code)
