"""The files of cluster/: KubeRay's fields, a head that does no work, one image and one Ray everywhere, no secret in them."""

import http.server
import json
import os
import re
import stat
import subprocess
import sys
import threading
import tomllib

import pytest
import yaml

from evolve_ray.serve.deploy import NODE_ENV
from tests.plain.processes import ROOT

CLUSTER = ROOT / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("ray*.yaml"))
LAUNCHER = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]

# Fields of KubeRay's v1 API that these manifests use, with their types; the API server refuses any other name.
GROUP = {"rayStartParams": dict, "template": dict}
WORKERS = GROUP | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
CLUSTER_SPEC = {"rayVersion": str, "authOptions": dict, "headGroupSpec": dict, "workerGroupSpecs": list}
JOB_SPEC = {
    "entrypoint": str, "submissionMode": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int, "rayClusterSpec": dict,
}  # fmt: skip


SERVICE_SPEC = {"excludeHeadPodFromServeSvc": bool, "serveConfigV2": str, "rayClusterConfig": dict}
KINDS = {"rayjob": "RayJob", "raycluster": "RayCluster", "rayservice": "RayService"}


def read(path):
    return yaml.safe_load(path.read_text())


def held_to(found, allowed):
    assert {name: type(value) for name, value in found.items()} == {name: allowed[name] for name in found}


def cluster_of(document):
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pinned(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(re.search(r"==([\d.]+)", line).group(1) for line in project["dependencies"] if line.startswith(name))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest_has_the_fields_of_kuberay(path):
    document = read(path)
    assert document["apiVersion"] == "ray.io/v1"
    assert document["kind"] == KINDS[path.name.partition("-")[0]]
    if document["kind"] == "RayJob":
        held_to(document["spec"], JOB_SPEC)
        assert document["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    if document["kind"] == "RayService":
        held_to(document["spec"], SERVICE_SPEC)
    cluster = cluster_of(document)
    held_to(cluster, CLUSTER_SPEC)
    held_to(cluster["headGroupSpec"], GROUP)
    for group in cluster["workerGroupSpecs"]:
        held_to(group, WORKERS)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes texts there"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest_has_a_token_one_image_shared_storage_and_a_head_without_work(path):
    cluster = cluster_of(read(path))
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == pinned("ray")
    head, *workers = pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert head["rayStartParams"]["num-cpus"] == "0"
    containers = [pod["template"]["spec"]["containers"][0] for pod in pods]
    assert len({container["image"] for container in containers}) == 1
    assert "nvidia.com/gpu" not in containers[0]["resources"]["limits"]
    for pod, container in zip(pods, containers, strict=True):
        volumes = {volume["name"]: volume for volume in pod["template"]["spec"]["volumes"]}
        assert (
            volumes["shared"]["persistentVolumeClaim"]["claimName"] == read(CLUSTER / "kuberay/storage.yaml")["metadata"]["name"]
        )
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
    for pod, container in zip(workers, containers[1:], strict=True):
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert pod["rayStartParams"].get("num-gpus") == gpus


@pytest.mark.parametrize("path", [path for path in MANIFESTS if path.name.startswith("rayjob")], ids=lambda path: path.name)
def test_job_runs_a_shipped_recipe_into_the_shared_folder(path):
    words = read(path)["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "/opt/evolve-ray/jobs/iterate.py"]
    assert (ROOT / words[2].removeprefix("/opt/evolve-ray/")).is_file()
    assert words[3] == "--run"
    assert words[4].startswith("/shared/")


def test_service_serves_what_the_configuration_of_serve_says_and_its_nodes_are_prepared_for_it():
    document = read(CLUSTER / "kuberay" / "rayservice-gpu.yaml")
    assert yaml.safe_load(document["spec"]["serveConfigV2"]) == read(CLUSTER / "serve.yaml")
    cluster = cluster_of(document)
    for pod in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        container = pod["template"]["spec"]["containers"][0]
        env = {part["name"]: part.get("value") for part in container["env"]}
        assert NODE_ENV.items() <= env.items()
        assert {"name": "serve", "containerPort": 8000} in container["ports"]
        keys = read(CLUSTER / "serve.yaml")["applications"][0]["args"]["api_key_env"]
        assert all(env[name] is None for name in keys), "from a secret"


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_launcher_listens_on_loopback_and_wants_the_token(path):
    config = read(path)
    head, worker = ("\n".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0" in head
    assert list(config["file_mounts"]) == ["/home/ray/.ray/auth_token"]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_lock_pins_everything_and_names_no_index(kind):
    text = (CLUSTER / f"requirements-{kind}.txt").read_text()
    assert "://" not in text
    assert "--" not in text
    assert all("==" in line for line in text.splitlines())
    for name in ("ray", "deepspeed"):
        assert f"\n{name}=={pinned(name)}\n" in text
    assert f"\ntorch=={pinned('torch')}{'+cpu' if kind == 'cpu' else ''}\n" in text


def test_no_file_holds_a_secret():
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            assert not re.search(r"hf_[A-Za-z0-9]{20}|[0-9a-f]{40}|AKIA[0-9A-Z]{12}|BEGIN [A-Z ]*KEY", path.read_text()), path


STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0") $*" in
  scontrol*) printf 'n1\\nn2\\n' ;;
  srun*hostname*) echo 10.0.0.1 ;;
  srun*) exec sleep 60 ;;
  "ray list"*) printf '"node_id": 1\\n"node_id": 2\\n' ;;
  "ray job submit"*) exit "$CODE" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs cluster/slurm.sh where Slurm's and Ray's commands only write down how they are called."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("srun", "scontrol", "ray"):
        (bin_folder / name).write_text(STUB)
        (bin_folder / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments, code=0, job="12345"):
        environment = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "CALLS": str(calls), "CODE": str(code)}
        environment |= {"EVOLVE_RAY_BIN": str(bin_folder), "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]"}
        environment |= {"SLURM_JOB_ID": job} if job else {}
        result = subprocess.run(["bash", CLUSTER / "slurm.sh", *arguments], env=environment, capture_output=True, text=True)
        return result, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_slurm_starts_every_node_submits_and_removes_the_token(slurm, tmp_path):
    result, calls = slurm("recipe.toml", "--run", "/shared/run", "seed=1")
    assert result.returncode == 0, result.stderr
    starts = sorted((call for call in calls if call.startswith("srun") and "ray start" in call), key=lambda call: "=n2" in call)
    assert "--nodelist=n1" in starts[0]
    assert "ray start --head --node-ip-address=10.0.0.1 --port=22345 --dashboard-host=127.0.0.1" in starts[0]
    assert "--nodelist=n2" in starts[1]
    assert "ray start --address=10.0.0.1:22345" in starts[1]
    submits = [call for call in calls if "job submit" in call]
    assert submits == [
        "ray job submit --address http://127.0.0.1:32345 --submission-id evolve-ray-12345 --working-dir . -- "
        "python jobs/iterate.py recipe.toml --run /shared/run seed=1"
    ]
    assert not any("job stop" in call for call in calls)
    assert not list(tmp_path.glob(".evolve-ray-*"))


def test_slurm_passes_a_failure_on(slurm):
    result, _ = slurm("recipe.toml", code=3)
    assert result.returncode == 3


def test_slurm_outside_of_a_job_says_how_to_submit(slurm):
    result, calls = slurm("recipe.toml", job="")
    assert (result.returncode, calls) == (2, [])
    assert result.stderr == "error: this is no Slurm job; submit it with: sbatch cluster/slurm.sh recipe.toml\n"
    assert slurm()[0].stderr.startswith("usage: sbatch cluster/slurm.sh")


def test_scripts_are_executable():
    assert all(path.stat().st_mode & stat.S_IXUSR for path in CLUSTER.glob("*.sh"))


class Prometheus(http.server.BaseHTTPRequestHandler):
    """Answers every query with one series, but for `empty`, which it has nothing on."""

    empty = "no such metric"

    def do_GET(self):
        found = [] if self.empty in self.path else [{"metric": {"kind": "prompt"}, "values": [[1.0, "2.5"], [2.0, "NaN"]]}]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": {"result": found}}).encode())

    def log_message(self, *_):
        pass


def panels(*arguments):
    return subprocess.run([sys.executable, CLUSTER / "panels.py", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("empty", "code"), [("no such metric", 0), ("learning_rate", 1)])
def test_panels_are_asked_and_drawn_without_grafana_and_an_empty_one_is_said(tmp_path, monkeypatch, empty, code):
    monkeypatch.setattr(Prometheus, "empty", empty)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Prometheus) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            sys.executable,
            CLUSTER / "panels.py",
            f"http://127.0.0.1:{server.server_port}",
            "--picture",
            tmp_path / "panels.png",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        server.shutdown()
    assert done.returncode == code, done.stderr
    assert f"{0 if code else 1:4} series  Learning rate" in done.stdout
    assert (tmp_path / "panels.png").read_bytes().startswith(b"\x89PNG")


def test_panels_say_that_no_prometheus_answers():
    done = subprocess.run(
        [sys.executable, CLUSTER / "panels.py", "http://127.0.0.1:9"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: http://127.0.0.1:9: ")
