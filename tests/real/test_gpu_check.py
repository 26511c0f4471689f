"""The whole of `make gpu-check`, on a CPU and at a tiny size: on a machine with a GPU only the device is new."""

import subprocess
import sys

import pytest

from tests.real.conftest import ROOT


@pytest.mark.long
def test_gpu_check_runs_on_a_cpu_and_writes_its_page(tmp_path):
    page = tmp_path / "gpu-check.md"
    command = [sys.executable, str(ROOT / "jobs/bench.py"), "gpu", "--device", "cpu", "--page", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    text = page.read_text()
    for row in ("iteration_idle", "evolve_tree_vs_separate", "dpo_vs_trl", "memory_vs_trl", "memory_vs_full_logits", "reload_s"):
        assert f"\n{row}" in text
    assert "tree, MFU: " in text
    assert "| engines | " in text


def test_gpu_check_without_a_gpu_is_one_sentence():
    done = subprocess.run([sys.executable, str(ROOT / "jobs/bench.py"), "gpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("--device cpu runs the same at a tiny size")
