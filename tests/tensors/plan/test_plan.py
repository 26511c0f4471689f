"""The plan counts what would run without starting anything."""

import json

import pytest

from evolve_ray.config.load import load
from evolve_ray.config.options import Training
from evolve_ray.errors import UserError
from evolve_ray.plan.plan import model_bytes, plan, rows_by_split
from evolve_ray.plan.shapes import Shape, read_shape
from evolve_ray.plan.sizing import GIB, Cluster, sequences, training_memory
from evolve_ray.store.run import Run, Stage
from evolve_ray.train.objectives import find
from tests.plain.processes import ROOT


@pytest.fixture
def config(recipe, tmp_path):
    """A recipe whose files exist; `load` takes overrides."""
    for name, count in (("prompts", 50), ("held", 7)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(count)))
    paths = [f"prompts.path={tmp_path}/prompts.jsonl", f"evaluation.splits.held={tmp_path}/held.jsonl"]
    return lambda *more: load(recipe(), [*paths, "prompts.per_iteration=10", "sampling.max_tokens=100", *more])


def test_plan_names_prompts_drafts_tokens_and_pairs(config, tmp_path):
    text, _ = plan(config("strategy.rounds=3"), Run(tmp_path / "run"))
    assert "50 rows; 10 new prompts per iteration" in text
    assert "prompts 10   drafts 30   generated tokens 3,000   pairs 10" in text
    assert "evaluation: 7 prompts, 28 drafts, 2,800 generated tokens" in text


def test_plan_of_parallel_sampling_counts_samples(config, tmp_path):
    text, _ = plan(config("strategy.name=parallel", "strategy.samples=8"), Run(tmp_path / "run"))
    assert "drafts 80 " in text


def test_plan_says_what_trainings_start_from_and_what_is_mixed_in(config, tmp_path):
    overrides = ("training.start=initial", "training.replay=0.3", "training.given=0.2", "prompts.again=when_used_up")
    triples = tmp_path / "triples.jsonl"
    triples.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    text, _ = plan(config(*overrides, f"activation.path={triples}"), Run(tmp_path / "run"))
    assert "10 new prompts per iteration, again in a new order when all are used up" in text
    assert "each training starts from the initial policy; 30% of the rows replayed; 20% of the rows given" in text
    assert "pairs 20" in text, "10 own ones are half"
    assert "pairs (to do), mixed (to do), reference (to do)" in text
    assert "mixed" not in plan(config(), Run(tmp_path / "run"))[0]


def test_limit_of_the_evaluation_is_in_the_plan(config):
    assert rows_by_split(config("evaluation.limit=5")) == {"held": 5}
    assert rows_by_split(config("evaluation.limit=50")) == {"held": 7}


def test_plan_shows_what_is_committed_already(config, tmp_path):
    run = Run(tmp_path / "run")
    stage = Stage(run.iteration(1) / "pairs", "pairs", "key")
    stage.start()
    stage.commit()
    lines = plan(config(), run)[0].splitlines()
    one = next(line for line in lines if line.startswith("iteration 1:"))
    assert "pairs (committed)" in one
    assert one.count("to do") == 9
    assert "activation" not in next(line for line in lines if line.startswith("iteration 0:"))


def test_plan_of_a_missing_file_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        plan(config("prompts.path=nowhere.jsonl"), Run(tmp_path / "run"))


def test_plan_writes_nothing(config, tmp_path):
    plan(config(), Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_size_of_a_checkpoint_is_read_from_the_headers(config, tiny_model):
    size = model_bytes(config(f"model.path={tiny_model}"))
    file = (tiny_model / "model.safetensors").stat().st_size
    assert file - 8192 < size < file
    assert model_bytes(config("model.path=owner/name")) is None


@pytest.mark.parametrize("objective", ["sft", "dpo", "ipo", "srpo", "evolve", "reward"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("nll", [0.0, 0.1])
def test_sized_sequences_are_those_that_the_objective_reads(objective, alpha, nll):
    training = Training(objective=objective, alpha=alpha, nll=0.0 if objective == "reward" else nll)
    assert set(sequences(training)) == set(find(training).needs)


def test_sizing_agrees_with_deepspeeds_own_estimator(monkeypatch):
    """Its states a GPU: 18 bytes a parameter over all GPUs, and weight and gradient of the largest layer."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    shape = Shape(4096, 32, 32, 8, 128, 14336, 128256, False, False, False)
    config = load(ROOT / "jobs/recipes/llama31_8b.toml", ["trainer.workers=32"])
    of_theirs, largest = estimate_zero3_model_states_mem_needs(shape.parameters, shape.largest, 8, 4, cpu_offload=False)[1:]
    (_, states), (_, gathered), *_ = training_memory(config, config.training, shape, Cluster(4, 8, 80.0)).parts
    live_and_buckets = 2 * (1e9 + 5e8)
    assert states * GIB + gathered * GIB - live_and_buckets == pytest.approx(of_theirs, rel=1e-6)
    assert largest == 4 * shape.largest


def test_parameters_are_counted_as_transformers_counts_them(tiny_model):
    assert read_shape(str(tiny_model), "model.path").parameters == num_parameters(tiny_model)


def num_parameters(folder):
    from transformers import AutoModelForCausalLM

    return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
