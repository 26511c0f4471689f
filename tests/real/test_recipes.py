"""Recipes whose parts the demo does not use, through the real command at a small size."""

import json
import shutil

import pytest

from evolve_ray.models.folders import content_hash
from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from tests.real.conftest import SMALL, fork, start

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def refreshed(small):
    """One iteration in which the reward model is trained again and is asked in the middle of a chain."""
    run = fork(small, "refreshed")
    for folder in ("base_evaluation", "evaluation"):  # their reward is another one here
        shutil.rmtree(run / "iteration-00" / folder)
    (run / "config.json").unlink()
    few = ["toy.reward_model_steps=20", "refresh.prompts=24", "refresh.training.epochs=1", "evaluation.parallel=0"]
    best_of = ["strategy.name=best_of", "strategy.rounds=2", "strategy.samples=2"]
    command = start(run, *SMALL, *few, *best_of, "--iterations", "1", recipe="tiny_reward_model")
    assert command.wait() == 0
    return run


def test_a_refreshed_reward_model_orders_the_drafts_of_best_of_chains(refreshed):
    """The reward model is trained on the policy's own drafts, and the scores of the pairs are the trained one's."""
    here = refreshed / "iteration-01"
    trained, labels = read_manifest(here / "reward_model"), read_manifest(here / "labels")
    assert labels.stats["num_rows"] == 2 * 16 * 4  # whole shards of 16 prompts, two rounds of two samples
    pairs = rows.read_table(here / "reward_pairs" / "pairs.parquet")
    assert 0 < len({pair["prompt_id"] for pair in pairs}) <= 24
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    log = rows.read_jsonl(here / "reward_model" / "training_log.jsonl")
    assert {"loss_reward", "accuracy", "margin"} <= set(log[0])
    toy = next(refreshed.parent.glob("toy-reward-model-*")) / "reward_model"
    assert content_hash(trained.folder) != content_hash(toy)
    # The scores of the pairs are the refreshed model's: a plain forward says the same.
    from evolve_ray.config.options import Scorer
    from evolve_ray.score.reward_model import RewardModel

    score = RewardModel(Scorer(batch_size=64, max_tokens=128), str(trained.folder))
    table = rows.read_table(here / "pairs" / "pairs.parquet")[:20]
    given = score([pair["prompt"] for pair in table], [None] * len(table), [pair["chosen"] for pair in table])
    assert all(abs(one - pair["chosen_score"]) < 1e-4 for one, pair in zip(given, table, strict=True))
    drafts = read_manifest(here / "generations")
    assert drafts.stats["num_judged"] == 64
    assert read_manifest(here / "reference").stats["num_rows"] == len(rows.read_table(here / "pairs" / "pairs.parquet"))


def test_the_recipe_of_the_paper_runs_scaled_down(refreshed, place):
    """llama31_8b.toml with a tiny Llama, a tiny reward model and no GPU: bf16, ZeRO-3, gradient checkpointing, its objective."""
    world = next(place.glob("toy-world-*"))
    reward_model = next(place.glob("toy-reward-model-*")) / "reward_model"
    scaled = [
        f"model.path={world / 'base'}", "model.chat_template=''", "model.context_tokens=256",
        f"prompts.path={world / 'train.jsonl'}",
        "prompts.per_iteration=48", f"activation.path={world / 'triples.jsonl'}", "activation.limit=0",
        f"evaluation.splits.heldout={world / 'heldout.jsonl'}",
        f"scorer.model={reward_model}", "scorer.max_tokens=128", "scorer.actors=1", "scorer.gpus_per_actor=0",
        "scorer.cpus_per_actor=0.1", "template.name=tiny", "sampling.max_tokens=24", "trainer.workers=2", "trainer.use_gpu=false",
        "trainer.cpus_per_worker=0.4", "selection.margin=0.0", "engine.actors=1", "engine.gpus_per_actor=0",
        "engine.cpus_per_actor=0.8", "engine.args.tensor_parallel_size=1", "engine.args.enforce_eager=true",
        "engine.args.enable_chunked_prefill=false", "engine.args.max_num_batched_tokens=4096",
        "engine.args.gpu_memory_utilization=0.05", "engine.args.kv_cache_memory_bytes=268435456",
        "engine.env.VLLM_CPU_OMP_THREADS_BIND=nobind", "engine.env.OMP_NUM_THREADS='1'", "probe.cpus=0.1", "ray.num_cpus=2",
        "ray.dashboard=false", "activation.training.micro_pairs=16", "training.micro_pairs=8", "evaluation.limit=16",
    ]  # fmt: skip
    command = start(place / "llama", *scaled, "--iterations", "1", recipe="llama31_8b")
    assert command.wait() == 0
    report = json.loads((place / "llama" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["base", "activation", "iteration 1"]
    first = rows.read_jsonl(place / "llama" / "iteration-01" / "checkpoint" / "training_log.jsonl")[0]
    assert abs(first["loss_dpo"] - 0.6931) < 1e-3
    config = json.loads((place / "llama" / "iteration-01" / "checkpoint" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")


def test_the_tiny_recipe_in_bfloat16(place):
    """Engines, probe, training, reference and export in bfloat16: every arrow of the loop, and a loss that starts at ln 2."""
    command = start(place / "half", *SMALL, "model.dtype=bfloat16", "probe.tolerance=0.02", "--iterations", "1")
    assert command.wait() == 0
    here = place / "half" / "iteration-01"
    config = json.loads((here / "checkpoint" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    first = rows.read_jsonl(here / "checkpoint" / "training_log.jsonl")[0]
    assert abs(first["loss_dpo"] - 0.6931) < 1e-3
    (probe,) = rows.read_jsonl(here / "probe" / "probe.jsonl")
    assert probe["mean_difference"] < 0.02, "nats a token, between an engine and a plain forward"
    assert len(rows.read_table(here / "pairs" / "pairs.parquet")) > 0
