"""One driver at a time in a run directory; the kernel frees the lock of a driver that dies."""

import json
import signal

import pytest

from evolve_ray.errors import LockedError, UserError
from evolve_ray.store import Run
from tests.plain.processes import start_python

HOLD = """
from pathlib import Path
from evolve_ray.store import Run
with Run(Path({root!r})).locked():
    print("held", flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the run in `tmp_path`."""
    process = start_python(HOLD.format(root=str(tmp_path)))
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_second_driver_is_told_who_holds_the_run(tmp_path, holder):
    with pytest.raises(LockedError) as caught, Run(tmp_path).locked():
        pass
    assert f'"pid": {holder.pid}' in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_killed_holder_frees_the_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Run(tmp_path).locked():
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] != holder.pid


def test_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Run(tmp_path).locked():
        raise ZeroDivisionError
    with Run(tmp_path).locked():
        pass


def test_run_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --run"), Run(tmp_path / "file").locked():
        pass
