"""The page about a GPU, made from figures written by hand; tests/real/test_gpu_check.py runs the whole check on a CPU."""

import argparse

import pytest

from evolve_ray.bench import gpu, loop
from evolve_ray.bench.table import Row
from evolve_ray.config.load import build
from evolve_ray.report.clock import PARTS

TURN = loop.Turn(30.0, 90.0, 50.0, dict(zip(PARTS, (20.0, 1.0, 4.0, 10.0, 2.0, 3.0), strict=True)), [{}] * 8, [0.7])


def test_idle_share_is_all_but_engines_scoring_and_updates():
    row = gpu.iteration_row(TURN, argparse.Namespace(prompts=8))
    assert row.values == [pytest.approx(37.5)]
    assert row.counts == {"seconds": 40.0, "pairs": 8, "updates": 1, "prompts": 8}


def test_mfu_is_the_share_of_the_peak_of_the_device():
    (row,) = gpu.with_mfu([Row("tree", "x", [2.0], {"tree, model TFLOP/s": 197.8})], "NVIDIA H100 80GB HBM3")
    assert row.counts["tree, MFU"] == "20.0% of 989 TFLOP/s"
    (row,) = gpu.with_mfu([Row("tree", "x", [2.0], {"tree, model TFLOP/s": 1.0})], "Voodoo 2")
    assert row.counts["tree, MFU"] == "unknown: no peak is known for Voodoo 2"


@pytest.mark.parametrize("device", gpu.SIZES)
def test_recipe_of_each_device_is_valid_and_its_chains_fit_the_context(device, tmp_path):
    sizes = gpu.loop_sizes(device)
    config = build(gpu.nested(loop.recipe(tmp_path, sizes, 0.5)), "gpu", "", ())
    assert (config.model.dtype, config.trainer.forward) == ("bfloat16", "tree")
    assert config.trainer.use_gpu == config.engine.release_for_training == (device == "cuda")
    assert sizes.prompt + 2 * sizes.new + 64 <= sizes.context
    assert sizes.prompts % sizes.batch == 0


def test_page_has_the_device_the_parts_and_the_rows():
    page = gpu.as_page("cpu", TURN, [Row("reload_s", "s", [1.0, 2.0, 3.0])], 61.0)
    for part in ("the whole check took 61 s", "| reference and updates | 4.0 |", "reload_s  2 s [1, 3] of 3", "torch 2."):
        assert part in page
