"""One run in odd surroundings: another hash seed, locale and folder, secrets in the environment, a dashboard, a second driver."""

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from evolve_ray.store import rows
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import MANIFEST
from tests.faults.harness import after_shards, arguments, ended, family, last_line, title
from tests.faults.twin import assert_equals_twin
from tests.real.conftest import Command, fork, start

SECRETS = {name: f"canary-{number}-7f3a9c" for number, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"))}
ODD = {"PYTHONHASHSEED": "7", "LC_ALL": "C"}


@dataclass
class Odd:
    """What was seen while the run was going on."""

    run: Path
    command: Command
    sessions: Path  # Ray's
    sockets: dict[str, set[str]]  # what listens, by the title of its process
    second: Command
    second_s: float


@pytest.fixture(scope="module")
def surroundings():
    """The environment of the runs here; Ray's sessions have a folder of their own, with a short name for the sake of sockets."""
    sessions = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SECRETS, **ODD, "RAY_TMPDIR": str(sessions)}.items():
            patch.setenv(name, value)
        yield sessions
    shutil.rmtree(sessions, ignore_errors=True)


@pytest.fixture(scope="module")
def odd(small, surroundings, tmp_path_factory):
    run, elsewhere = fork(small, "odd"), tmp_path_factory.mktemp("elsewhere")
    with ended(start(run, *arguments("ray.dashboard=true", "engine.actors=1"), cwd=elsewhere)) as command:
        command.wait_for(after_shards(1), 600)
        sockets = listening(command)
        driver = psutil.Process(command.process.pid)
        started = time.monotonic()
        with ended(start(run, *arguments())) as second:
            second.process.wait(60)
        took = time.monotonic() - started
        assert driver.is_running(), "the first driver did not survive the second"
        assert command.wait(1200) == 0
    return Odd(run, command, surroundings, sockets, second, took)


def listening(command: Command) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for process in [psutil.Process(command.process.pid), *family(command.process.pid)]:
        try:
            heard = {
                c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN
            }
        except psutil.Error:
            continue
        if heard:
            found.setdefault(title(process), set()).update(heard)
    return found


def test_another_hash_seed_locale_and_working_folder_give_the_same_run(odd, small):
    assert_equals_twin(odd.run, small.run)


def test_second_driver_ends_within_five_seconds_naming_the_holder_and_the_first_is_unaffected(odd, small):
    assert odd.second.process.returncode == 3
    said = last_line(odd.second)
    assert said.startswith(f"error: {odd.run}: another driver works on this run: ")
    assert f'"pid": {odd.command.process.pid}' in said
    print(f"the second driver ended after {odd.second_s:.1f} s")
    assert odd.second_s < 5
    assert sum(event["event"] == "driver_start" for event in rows.read_jsonl(odd.run / "events.jsonl")) == 1
    assert_equals_twin(odd.run, small.run)


def test_dashboard_job_api_and_everything_else_of_a_local_ray_listen_on_loopback_alone(odd):
    shown = "\n".join(f"{name[:100]}: {sorted(heard)}" for name, heard in odd.sockets.items())
    for part in ("dashboard/dashboard.py", "raylet/raylet", "gcs_server"):
        assert any(part in name for name in odd.sockets), f"nothing of {part} listens:\n{shown}"
    assert any("dashboard/agent.py" in name or "DashboardAgent" in name for name in odd.sockets), shown
    assert {address.removeprefix("::ffff:") for heard in odd.sockets.values() for address in heard} <= {"127.0.0.1", "::1"}, shown


def leaks(*folders: Path) -> dict[str, list[str]]:
    """Secrets by the file that holds them."""
    found = {}
    for path in (path for folder in folders for path in ([folder] if folder.is_file() else folder.rglob("*")) if path.is_file()):
        data = path.read_bytes()
        if held := [name for name, value in SECRETS.items() if value.encode() in data]:
            found[str(path)] = held
    return found


def test_secrets_of_the_environment_are_nowhere_in_the_run_and_in_the_logs_of_its_ray(odd):
    logs = list(odd.sessions.rglob("raylet.out"))
    assert logs, "this is not where Ray writes its logs"
    assert leaks(odd.run, odd.command.log, odd.second.log, odd.sessions) == {}


def test_reference_that_is_not_finite_ends_the_run_with_exit_code_six_and_without_secrets(small, surroundings):
    run = fork(small, "not-finite", keep=("prompts", "generations", "scores", "pairs", "reference"))
    pair = poison(run / "iteration-01" / "reference", 5)
    with ended(start(run, *arguments())) as command:
        assert command.wait(600) == 6
    said = last_line(command)
    assert said.startswith("error: training step "), said
    assert f"pairs ['{pair}']" in said, said
    assert not (run / "iteration-01" / "checkpoint").exists()
    assert [event["error"] for event in rows.read_jsonl(run / "events.jsonl") if event["event"] == "driver_failed"]
    assert leaks(run, command.log, surroundings) == {}


def poison(folder: Path, number: int) -> str:
    """NaN for one pair of a committed reference, whose manifest tells it as if it had been so; the pair's id."""
    path = folder / "reference.parquet"
    table = rows.read_table(path)
    name = next(name for name in rows.REFERENCE.names[1:] if table[number][name] is not None)
    table[number][name] = float("nan")
    rows.write_table(path, table, rows.REFERENCE)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return table[number]["pair_id"]
