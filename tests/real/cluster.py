"""A Ray cluster of this machine's own: `ray start` nodes with a token, each with a session folder of its own, and jobs on it."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.real.conftest import ROOT, SMALL

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def await_(found: Any, seconds: float, what: str, tick: float = 0.5) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, what
        time.sleep(tick)
    return value


class Cluster:
    """Nodes by name; `port` is the head's, below the ports of Ray's workers."""

    def __init__(self, folder: Path, port: int, **environment: str):
        self.folder, self.port = folder, port
        self.sessions = Path(tempfile.mkdtemp(prefix="ray-"))  # short: names of sockets have 107 characters
        self.nodes: dict[str, subprocess.Popen] = {}
        self.agents: dict[str, int] = {}  # the port of each node's dashboard agent, which has a job API of its own
        (folder / "token").write_text(secrets.token_hex(32))
        self.environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")} | environment
        self.environment.pop("RAY_ADDRESS", None)
        self.address = f"http://127.0.0.1:{free_port()}"

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    def start(self, name: str, *options: str, cpus: int = 2, **environment: str) -> None:
        """The head first, then others."""
        command = [RAY, "start", "--block", f"--num-cpus={cpus}", "--object-store-memory=200000000", "--disable-usage-stats"]
        command += options
        self.agents[name] = free_port()
        command += [f"--temp-dir={self.sessions / name}", f"--dashboard-agent-listen-port={self.agents[name]}"]
        if self.nodes:
            command.append(f"--address=127.0.0.1:{self.port}")
        else:
            command += ["--head", f"--port={self.port}"]
            command += [] if "RAY_FAKE_CLUSTER" in environment else ["--node-ip-address=127.0.0.1"]  # those find it elsewhere
            command += [f"--dashboard-port={self.address.rsplit(':', 1)[1]}", f"--ray-client-server-port={free_port()}"]
        with open(self.folder / f"{name}.log", "wb") as log:
            self.nodes[name] = subprocess.Popen(
                command, env=self.environment | environment, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder
            )
        alive = len(self.nodes)
        await_(lambda: len(self.ask("nodes", "state=ALIVE")) >= alive, 90, (self.folder / f"{name}.log").read_text()[-2000:])

    def ask(self, what: str, *filters: str) -> list[dict]:
        """`ray list`; [] while the cluster does not answer."""
        command = [RAY, "list", what, "--address", self.address, "--format", "json", "--detail"]
        for one in filters:
            command += ["--filter", one]
        said = subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout
        return json.loads(said[said.find("[") :]) if "[" in said else []

    def alive(self) -> int:
        """How many nodes live now, asked of the dashboard."""
        request = urllib.request.Request(f"{self.address}/nodes?view=summary", headers={"Authorization": f"Bearer {self.token}"})
        found = json.loads(urllib.request.urlopen(request, timeout=20).read())["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in found)

    def family(self, name: str) -> list[psutil.Process]:
        process = psutil.Process(self.nodes[name].pid)
        return [*process.children(recursive=True), process]

    def submit(self, run: Path, *overrides: str, iterations: int = 1) -> str:
        """The command as a job; its id."""
        entry = ["python", "jobs/iterate.py", "jobs/recipes/tiny.toml", "--run", str(run), *SMALL]
        entry += ["--iterations", str(iterations), *overrides]
        job = f"{run.name}-{time.time_ns()}"
        submit = [RAY, "job", "submit", "--no-wait", "--submission-id", job, "--address", self.address]
        submit += ["--working-dir", str(ROOT)]
        done = subprocess.run([*submit, "--", *entry], env=self.environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        return job

    def jobs(self) -> dict[str, dict]:
        """What the job API says of every submitted job, by its id."""
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"})
        found = json.loads(urllib.request.urlopen(request, timeout=20).read())
        return {job["submission_id"]: job for job in found if job["type"] == "SUBMISSION"}

    def status(self, job: str) -> str:
        return self.jobs()[job]["status"]

    def log(self, job: str) -> str:
        command = [RAY, "job", "logs", job, "--address", self.address]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def wait(self, job: str, seconds: float = 900) -> str:
        """The status that a job ends with."""
        over = ("SUCCEEDED", "FAILED", "STOPPED")
        return await_(lambda: (status := self.status(job)) in over and status, seconds, f"{job} is not over")

    def stop_job(self, job: str) -> None:
        command = [RAY, "job", "stop", job, "--address", self.address]
        assert subprocess.run(command, env=self.environment, capture_output=True).returncode == 0

    def kill(self, name: str) -> list[psutil.Process]:
        """SIGKILL to everything of a node; gives back what was killed."""
        members = self.family(name)
        for process in members:
            process.kill()
        self.nodes.pop(name).wait(10)
        return members


@contextmanager
def cluster_of(folder: Path, *names: str, port: int = 9479, **environment: str) -> Iterator[Cluster]:
    """A cluster of the named nodes, the head first; all its processes end with it, by their ids."""
    cluster = Cluster(folder, port, **environment)
    try:
        for name in names:
            cluster.start(name)
        yield cluster
    finally:
        members = [process for name in cluster.nodes for process in cluster.family(name)]
        for process in members:
            process.terminate()
        for process in psutil.wait_procs(members, timeout=20)[1]:
            process.kill()
        shutil.rmtree(cluster.sessions, ignore_errors=True)
