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


def test_without_the_token_the_job_api_refuses(cluster):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=20)
    assert caught.value.code in (401, 403)
