import contextlib
import socket
import sys
import time

import psutil
import pytest

from evolve_ray.watch import cluster


@pytest.fixture
def ends(monkeypatch):
    """Where a watch ends its process, and a tick that a test can wait for."""
    found = []
    monkeypatch.setattr(cluster, "TICK_S", 0.02)
    monkeypatch.setattr(cluster.HeadWatch, "end", lambda self: found.append(self.address))
    return found


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as found:
        yield found


def address(listener):
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_head_that_answers_ends_nobody(ends, listener):
    watch = cluster.HeadWatch(address(listener))
    time.sleep(1)
    watch.stop()
    assert ends == []


def test_head_that_is_gone_ends_the_driver_after_several_failures(ends, listener):
    watch = cluster.HeadWatch(address(listener))
    listener.close()
    deadline = time.monotonic() + 20
    while not ends and time.monotonic() < deadline:
        time.sleep(0.02)
    watch.stop()
    assert ends == [watch.address]


def test_stopped_watch_ends_nobody(ends, listener):
    watch = cluster.HeadWatch(address(listener))
    watch.stop()
    listener.close()
    time.sleep(1)
    assert ends == []


def test_sentence_names_the_head_and_the_way_out(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(cluster.os, "_exit", codes.append)
    monkeypatch.setattr(cluster.HeadWatch, "_watch", lambda self: None)
    cluster.HeadWatch("10.0.0.7:6379").end()
    assert codes == [5]
    assert "the head node at 10.0.0.7:6379 is lost" in capfd.readouterr().err


@pytest.fixture
def raylet(monkeypatch):
    """A watch of a process that calls itself a raylet with an agent, and where it ends its own."""
    found = []
    monkeypatch.setattr(cluster.RayletWatch, "end", lambda self: found.append(self.address))
    agent = "import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {agent!r}, 'dashboard/agent.py']).wait()"
    process = psutil.Popen([sys.executable, "-c", parent, "--raylet_socket_name=/s/raylet"])
    while not process.children():
        time.sleep(0.01)
    watch = cluster.RayletWatch("10.0.0.8:4444", "/s/raylet", None)
    time.sleep(0.5)
    assert found == []
    (child,) = process.children()
    yield watch, found, process, child
    watch.stop()
    for one in (child, process):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


@pytest.mark.parametrize("which", ["raylet", "agent"])
def test_raylet_or_agent_that_ends_ends_the_driver_at_once(raylet, which):
    watch, found, process, child = raylet
    (process if which == "raylet" else child).kill()
    started = time.monotonic()
    while not found and time.monotonic() < started + 20:
        time.sleep(0.001)
    assert found == [watch.address]
    assert time.monotonic() - started < 1


def test_raylet_that_ends_after_its_watch_was_stopped_ends_nobody(raylet):
    watch, found, process, _ = raylet
    watch.stop()
    process.kill()
    time.sleep(0.5)
    assert found == []


def test_process_that_is_gone_has_no_title_and_hinders_no_watch():
    process = psutil.Popen([sys.executable, "-c", ""])
    assert process.wait() == 0
    assert cluster.title(process) == ""


def test_raylet_that_is_not_among_the_processes_of_this_machine_is_not_watched():
    assert cluster.raylet_processes("/another/raylet") == []


@pytest.mark.parametrize("there", [True, False])
def test_sentence_names_the_head_where_that_is_lost_too(monkeypatch, capfd, there):
    codes = []
    monkeypatch.setattr(cluster.os, "_exit", codes.append)
    monkeypatch.setattr(cluster.HeadWatch, "_watch", lambda self: None)
    monkeypatch.setattr(cluster.RayletWatch, "_watch", lambda self: None)
    monkeypatch.setattr(cluster.HeadWatch, "answers", lambda self: there)
    cluster.RayletWatch("10.0.0.8:4444", "/s/raylet", cluster.HeadWatch("10.0.0.7:6379")).end()
    assert codes == [5]
    said = capfd.readouterr().err
    assert ("the raylet of this node at 10.0.0.8:4444 is gone" in said) == there
    assert ("the head node at 10.0.0.7:6379 is lost" in said) != there
    assert "submit the same command again" in said
