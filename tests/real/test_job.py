"""The driver as a submitted job on a cluster that `ray start` made, with a token."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.real.conftest import ROOT, SMALL, fork

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head node in processes of its own, ended by their ids."""
    tmp_path = tmp_path_factory.mktemp("cluster")
    ports = {name: str(free_port()) for name in ("dashboard", "agent", "client")}
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--port=9479", f"--dashboard-port={ports['dashboard']}"]
    command += [f"--dashboard-agent-listen-port={ports['agent']}", f"--ray-client-server-port={ports['client']}"]
    command += ["--object-store-memory=300000000"]
    with open(tmp_path / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    address = f"http://127.0.0.1:{ports['dashboard']}"
    deadline = time.monotonic() + 90
    while True:
        listed = subprocess.run([RAY, "job", "list", "--address", address], env=environment, capture_output=True, text=True)
        if listed.returncode == 0:
            break
        assert head.poll() is None, (tmp_path / "head.log").read_text()[-2000:]
        assert time.monotonic() < deadline, listed.stderr[-2000:]
        time.sleep(2)
    yield address, environment, token.read_text()
    family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
    for process in family:
        process.terminate()
    for process in psutil.wait_procs(family, timeout=20)[1]:
        process.kill()


def test_a_submitted_job_succeeds_and_is_listed_in_the_dashboard(cluster, small):
    address, environment, token = cluster
    run = fork(small, "job")
    entry = ["python", "jobs/iterate.py", "jobs/recipes/tiny.toml", "--run", str(run), *SMALL, "--iterations", "1"]
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--", *entry]
    result = subprocess.run(submit, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "succeeded" in result.stdout
    assert json.loads((run / "report.json").read_text())["models"][-1]["name"] == "iteration 1"
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    jobs = json.loads(urllib.request.urlopen(request, timeout=20).read())
    submitted = [job for job in jobs if job["type"] == "SUBMISSION"]
    assert [job["status"] for job in submitted] == ["SUCCEEDED"]
    holder = json.loads((run / "LOCK").read_text())
    assert holder["job"] == submitted[0]["submission_id"]
    twin, own = (folder / "iteration-01" / "pairs" / "pairs.parquet" for folder in (small.run, run))
    assert own.read_bytes() == twin.read_bytes()


def test_without_the_token_the_job_api_refuses(cluster):
    address, _, _ = cluster
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=20)
    assert caught.value.code in (401, 403)
