"""What a killed build leaves behind blocks nobody, and a living one is not disturbed."""

import subprocess
import sys

import pydantic
import pytest

from evolve_ray.errors import UserError
from evolve_ray.train import deepspeed_ops
from tests.plain.processes import ROOT

RANK = (
    "import sys\nfrom pathlib import Path\nfrom evolve_ray.train.deepspeed_ops import lock_build_folder\n"
    "lock_build_folder(Path(sys.argv[1]))\n"
)


def rank(folder, more=""):
    return subprocess.Popen(
        [sys.executable, "-c", RANK + more, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def build(folder):
    left = folder / "operator" / "lock"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    return left


def test_lock_of_a_killed_build_is_taken_away(tmp_path):
    left = build(tmp_path)
    assert rank(tmp_path).wait(20) == 0
    assert not left.exists()


def test_build_of_a_living_rank_is_left_alone_and_that_of_a_killed_one_is_not(tmp_path):
    living = rank(tmp_path, "print('here', flush=True)\nsys.stdin.read()\n")
    assert living.stdout.readline() == "here\n"
    left = build(tmp_path)
    assert rank(tmp_path).wait(20) == 0
    assert left.exists()
    living.kill()
    living.communicate()
    assert rank(tmp_path).wait(20) == 0
    assert not left.exists()


def test_folder_that_the_user_named_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "theirs"))
    assert deepspeed_ops.lock_build_folder() == tmp_path / "theirs"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert deepspeed_ops.lock_build_folder() == tmp_path / "cache" / "evolve-ray" / "operators"


class Options(pydantic.BaseModel, extra="forbid"):
    """As DeepSpeed declares its own."""

    stage: int = 0


def test_what_deepspeed_refuses_of_its_options_is_named_in_one_line():
    said = r"^trainer\.deepspeed: DeepSpeed does not accept it: .* stag Extra inputs are not permitted"
    with pytest.raises(UserError, match=said), deepspeed_ops.explain_errors():
        Options(stag=3)
    missing = "Unable to JIT load the async_io op due to it not being compatible"
    with (
        pytest.raises(UserError, match=rf"^trainer\.deepspeed: needs an operator .*: {missing}; install"),
        deepspeed_ops.explain_errors(),
    ):
        raise RuntimeError(missing)


def test_an_error_of_a_lost_peer_passes():
    with pytest.raises(RuntimeError, match="Connection closed by peer"), deepspeed_ops.explain_errors():
        raise RuntimeError("Connection closed by peer")
