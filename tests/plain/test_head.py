import socket
import time

import pytest

from evolve_ray import head


@pytest.fixture
def ends(monkeypatch):
    """Where a watch ends its process, and a tick that a test can wait for."""
    found = []
    monkeypatch.setattr(head, "TICK_S", 0.02)
    monkeypatch.setattr(head.HeadWatch, "end", lambda self: found.append(self.address))
    return found


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as found:
        yield found


def address(listener):
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_head_that_answers_ends_nobody(ends, listener):
    watch = head.HeadWatch(address(listener))
    time.sleep(1)
    watch.stop()
    assert ends == []


def test_head_that_is_gone_ends_the_driver_after_several_failures(ends, listener):
    watch = head.HeadWatch(address(listener))
    listener.close()
    deadline = time.monotonic() + 20
    while not ends and time.monotonic() < deadline:
        time.sleep(0.02)
    watch.stop()
    assert ends == [watch.address]


def test_stopped_watch_ends_nobody(ends, listener):
    watch = head.HeadWatch(address(listener))
    watch.stop()
    listener.close()
    time.sleep(1)
    assert ends == []


def test_sentence_names_the_head_and_the_way_out(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(head.os, "_exit", codes.append)
    monkeypatch.setattr(head.HeadWatch, "_watch", lambda self: None)
    head.HeadWatch("10.0.0.7:6379").end()
    assert codes == [5]
    assert "the head node at 10.0.0.7:6379 is lost" in capfd.readouterr().err
