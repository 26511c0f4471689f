"""What the benchmark of sizes makes of its seconds, and the engine without a model that it runs on."""

from types import SimpleNamespace

import pytest

from evolve_ray.bench import scale
from evolve_ray.bench.null import NullEngine
from evolve_ray.bench.table import as_json


def spent(prompts, seconds, **more):
    return scale.RunCost(
        prompts, {"drafts and scores": seconds - 1, "report": 1.0}, files=60, num_bytes=10 * prompts, shards=10, **more
    )


def test_growth_is_that_of_the_largest_size_against_the_cheapest_of_the_smaller_ones():
    made = scale.growth([[spent(10, 4.0, peak_mib=3.0), spent(100, 20.0, peak_mib=9.0), spent(1000, 220.0, peak_mib=5.0)]], 100.0)
    found = {row.name: row.values for row in made}
    assert found == {
        "scale_time_growth": [pytest.approx(1.1)], "scale_driver_mib": [9.0], "scale_report_s": [1.0],
        "scale_files_per_shard": [6.0], "scale_bytes_growth": [1.0],
    }  # fmt: skip


def test_engines_side_by_side_are_held_against_one_alone():
    took = {1: [10.0], 2: [10.0], 8: [12.5, 10.0, 20.0]}
    runs = {
        number: [scale.RunCost(1, {"drafts and scores": seconds}, shards=10) for seconds in some] for number, some in took.items()
    }
    made = scale.side_by_side(runs, requests_each=400, service_s=0.02)
    assert [row.name for row in made] == ["scale_1_actors", "scale_2_actors", "scale_8_actors"]
    assert made[-1].values == [0.8, 1.0, 0.5]
    assert as_json(made[-1])["median"] == 0.8
    counts = made[-1].counts
    assert (counts["requests/s"], counts["seconds"], counts["of these serving"]) == (256.0, 12.5, 8.0)


def test_the_pipeline_is_under_way_when_its_first_shard_is_done():
    at = [
        ("06.000", "driver_start"),
        ("07.000", "stage_start"),
        ("09.250", "shard"),
        ("10.000", "shard"),
        ("11.000", "stage_start"),
    ]
    events = [{"event": kind, "time": f"2026-01-01T00:00:{second}+00:00"} for second, kind in at]
    assert scale.first_shard_s(events) == 2.25


def test_every_prompt_of_the_sizes_is_another_one():
    assert len({scale.letters(number) for number in range(30_000)}) == 30_000


def test_the_drivers_own_memory_is_seen_at_its_peak():
    with scale.watched_memory() as peak:
        before = peak[0]
        held = bytearray(64 << 20)
        held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    assert peak[0] - before > 50


def test_the_null_engine_answers_in_order_with_what_the_seed_says():
    engine = NullEngine(SimpleNamespace(engine=SimpleNamespace(args={"service_s": 0.0})), None)
    for seed in (4, 5, 6):
        engine.submit(f"r{seed}", [1, 2, 3], seed)
    found = [engine.step()[0] for _ in range(3)]
    assert [(done.request_id, done.text, done.num_prompt_tokens) for done in found] == [
        ("r4", "yes", 3),
        ("r5", "no", 3),
        ("r6", "yes", 3),
    ]
