"""The probe between engine and checkpoint: what its sentence advises."""

from evolve_ray.config.load import load
from evolve_ray.stages.probe import advice


def test_small_difference_in_bfloat16_is_called_rounding_and_a_large_one_is_not(recipe):
    tight = load(recipe(), ["model.dtype=bfloat16", "probe.tolerance=0.0001"])
    assert advice(0.0035, tight).endswith("so much may be rounding in bfloat16; set probe.tolerance=0.05")
    assert "older model" in advice(0.2, tight)
    assert "older model" in advice(0.0035, load(recipe(), ["probe.tolerance=0.0001"]))
