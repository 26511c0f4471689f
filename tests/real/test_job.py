"""The driver as a submitted job on a cluster that `ray start` made, with a token."""

import json
import urllib.error
import urllib.request

import pytest

from tests.real.cluster import cluster_of
from tests.real.conftest import fork


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with cluster_of(tmp_path_factory.mktemp("cluster"), "head") as found:
        yield found


def test_a_submitted_job_succeeds_and_is_listed_in_the_dashboard(cluster, small):
    run = fork(small, "job")
    job = cluster.submit(run)
    assert cluster.wait(job, 600) == "SUCCEEDED", cluster.log(job)[-3000:]
    assert json.loads((run / "report.json").read_text())["models"][-1]["name"] == "iteration 1"
    assert cluster.jobs().keys() == {job}
    assert json.loads((run / "LOCK").read_text())["job"] == job
    twin, own = (folder / "iteration-01" / "pairs" / "pairs.parquet" for folder in (small.run, run))
    assert own.read_bytes() == twin.read_bytes()
    told = {actor["repr_name"] for actor in cluster.ask("actors", "class_name=Host")}
    assert {"engines 0", "scorers 0"} <= told, "what the dashboard calls the actors"


def ask(address: str, path: str, verb: str, token: str | None) -> int:
    """The status that a request is answered with."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token is not None else {})
    body = json.dumps({"entrypoint": "touch CANARY"}).encode() if verb == "POST" else None
    try:
        request = urllib.request.Request(f"{address}{path}", data=body, headers=headers, method=verb)
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("verb", ["GET", "POST"])
def test_without_the_token_or_with_a_wrong_one_the_job_api_of_dashboard_and_agent_refuses(cluster, verb):
    agent = f"http://127.0.0.1:{cluster.agents['head']}"
    logs = "/api/job_agent/jobs/none/logs"  # what an agent can be asked without changing anything
    places = [(cluster.address, "/api/jobs/"), (agent, logs if verb == "GET" else "/api/job_agent/jobs/")]
    before = cluster.jobs().keys()
    for address, path in places:
        for token in (None, "", "wrong", cluster.token[:-1]):
            assert ask(address, path, verb, token) in (401, 403), f"{verb} {address}{path} with token {token!r}"
    assert cluster.jobs().keys() == before, "a job was submitted without the token"
    if verb == "GET":  # the very same requests are answered with the token
        assert ask(*places[0], verb, cluster.token) == 200
        assert ask(*places[1], verb, cluster.token) not in (401, 403)
