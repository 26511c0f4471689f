"""One driver at a time in a run directory; the kernel frees the lock of a driver that dies."""

import json
import multiprocessing
import os
import time

import pytest

from evolve_ray.errors import LockedError, UserError
from evolve_ray.store.run import Run

fork = multiprocessing.get_context("fork")


def hold(root, held):
    with Run(root).locked():
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the run in `tmp_path`."""
    held = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(20)
    yield process
    process.kill()
    process.join()


def test_second_driver_is_told_who_holds_the_run(tmp_path, holder):
    with pytest.raises(LockedError) as caught, Run(tmp_path).locked():
        pass
    assert f'"pid": {holder.pid}' in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == holder.pid


def test_killed_holder_frees_the_lock(tmp_path, holder):
    holder.kill()
    holder.join()
    assert holder.exitcode == -9
    with Run(tmp_path).locked():
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()


def test_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Run(tmp_path).locked():
        raise ZeroDivisionError
    with Run(tmp_path).locked():
        pass


def test_program_that_the_driver_starts_does_not_inherit_the_lock(tmp_path):
    with Run(tmp_path).locked():
        lock = str(tmp_path / "LOCK")
        (descriptor,) = [int(fd) for fd in os.listdir("/proc/self/fd") if points_to(fd, lock)]
        assert not os.get_inheritable(descriptor)


def points_to(descriptor, path):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == path
    except OSError:
        return False


def test_run_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --run"), Run(tmp_path / "file").locked():
        pass
