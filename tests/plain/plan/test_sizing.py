"""Whether a recipe fits, summed by hand for the shape of Llama 3.1 8B; every way out is tried before it is named."""

import dataclasses
import json
import re

import pytest

from evolve_ray.config import load as config_load
from evolve_ray.config.options import Training
from evolve_ray.driver import main, parse
from evolve_ray.plan import estimate, fitting, sizing
from evolve_ray.plan.shapes import read_shape
from evolve_ray.plan.sizing import GIB, Cluster, forward_tokens, sequences
from tests.plain.processes import ROOT

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "model_type": "llama", "tie_word_embeddings": False,
}  # fmt: skip
NODE, FOUR = Cluster(1, 8, 80.0), Cluster(4, 8, 80.0)
RECIPES = {1: "llama31_8b.toml", 4: "llama31_8b_4nodes.toml"}


@pytest.fixture
def folders(tmp_path):
    """Overrides that name a policy and a reward model which are nothing but a config.json."""
    for name in ("policy", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA_8B))
    return [f"model.path={tmp_path}/policy", f"scorer.model={tmp_path}/reward"]


@pytest.fixture
def load(folders):
    """The 8B recipe with overrides, the shape of its model, and those of its reward models."""

    def load(*overrides, nodes=1):
        config = config_load.load(ROOT / "jobs/recipes" / RECIPES[nodes], [*folders, *overrides])
        return config, read_shape(config.model.path, "model.path"), [read_shape(config.scorer.model, "", classifier=True)]

    return load


def part(memory, name):
    return next(size for what, size in memory.parts if what.startswith(name))


def test_parameters_of_known_models_come_from_their_configuration(folders, tmp_path):
    shape = read_shape(folders[0].partition("=")[2], "model.path")
    assert shape.parameters == 8_030_261_248
    qwen = {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "model_type": "qwen2", "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(qwen))
    assert read_shape(str(tmp_path), "model.path").parameters == 494_032_768


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "has no usable 'num_attention_heads'"),
        ("[", "is not JSON"),
        (json.dumps(LLAMA_8B | {"num_local_experts": 8}), "is a mixture of experts"),
    ],
)
def test_shape_that_is_not_known_is_a_sentence(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    assert said in read_shape(str(tmp_path), "model.path")


def test_states_are_eighteen_bytes_a_parameter_over_all_workers(load):
    config, shape, _ = load()
    memory = sizing.training_memory(config, config.training, shape, NODE)
    assert part(memory, "states") == pytest.approx(18 * 8_030_261_248 / 8 / GIB)
    assert memory.fits
    alone, _, _ = load("trainer.workers=1")
    assert not sizing.training_memory(alone, alone.training, shape, NODE).fits


def test_states_of_adapters_are_the_frozen_weights_and_little_more(load):
    config, shape, _ = load("trainer.lora_rank=16")
    # Of each layer: query and output 4096 to 4096, key and value 4096 to 1024, three projections between 4096 and 14336.
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    memory = sizing.training_memory(config, config.training, shape, NODE)
    assert part(memory, "states") == pytest.approx((2 * 8_030_261_248 + 18 * adapters) / 8 / GIB)


def test_checkpointing_and_offload_take_less(load):
    def total(*overrides):
        config, shape, _ = load(*overrides)
        return sizing.training_memory(config, config.training, shape, NODE).total_gib

    assert total() < total("trainer.gradient_checkpointing=false")
    assert total('trainer.deepspeed={zero_optimization={offload_optimizer={device="cpu"}}}') < total()


def test_cache_of_an_engine_is_what_weights_leave(load):
    config, shape, _ = load("engine.args={tensor_parallel_size=1,gpu_memory_utilization=0.9}", "engine.gpus_per_actor=1")
    assert sizing.cache_bytes(config, shape) == 2 * 2 * 32 * 1024  # keys and values, bfloat16, layers, 8 heads of 128
    memory = sizing.engine_memory(config, shape, NODE)
    assert part(memory, "weights") == pytest.approx(2 * 8_030_261_248 / GIB)
    left = 0.9 * 80 - part(memory, "weights") - part(memory, "workspace")
    assert sizing.cache_tokens(config, shape, memory) == int(left * GIB / 131072)
    split, _, _ = load("engine.args={tensor_parallel_size=8}", "engine.gpus_per_actor=8")
    assert sizing.cache_bytes(split, shape) == 131072 / 8
    eighth, _, _ = load('engine.args={tensor_parallel_size=1,kv_cache_dtype="fp8"}', "engine.gpus_per_actor=1")
    assert sizing.cache_bytes(eighth, shape) == 65536


@pytest.mark.parametrize(
    ("training", "names"),
    [
        ({"objective": "sft"}, 2),
        ({"objective": "sft", "refine_weight": 0.0}, 1),
        ({"objective": "dpo"}, 2),
        ({"objective": "srpo"}, 4),
        ({"objective": "srpo", "nll": 0.1}, 5),
        ({"objective": "evolve", "alpha": 0.5}, 6),
        ({"objective": "evolve", "alpha": 0.0}, 2),
        ({"objective": "evolve", "alpha": 1.0, "nll": 0.1}, 5),
        ({"objective": "reward"}, 2),
    ],
)
def test_sequences_are_those_of_the_objective(training, names):
    """`tests/tensors/plan/test_plan.py` holds them to the objectives themselves."""
    assert len(sequences(Training(**training))) == names


def test_rows_are_as_long_as_the_context(load):
    config, _, _ = load("trainer.workers=8", "training.micro_pairs=2")
    if not sizing.reads_trees(config, config.training):
        assert forward_tokens(config, config.training) == 2 * 6 * config.model.context_tokens


@pytest.mark.parametrize(("cluster", "states"), [(NODE, "16.8"), (FOUR, "4.2")])
def test_the_recipe_fits_and_its_table_tells_hours_and_disk(load, cluster, states):
    config, _, _ = load(nodes=cluster.nodes)
    lines, found = estimate.report(config, 500, cluster)
    assert found == []
    text = "\n".join(lines)
    assert f"cluster    {cluster.nodes} node" in text
    assert re.search(rf"training +[\d.]+ +80\.0   states {states}", text)
    assert f"{cluster.num_gpus} of {cluster.num_gpus} GPUs, taking turns with {cluster.num_gpus} ZeRO-3 workers" in text
    assert re.search(r"H100 +\d", text)
    assert "checkpoint 15 GiB per iteration" in text


@pytest.mark.parametrize(
    ("overrides", "cluster", "said"),
    [
        (["engine.actors=9"], NODE, r"9 engines .* do not fit on 1 node of 8 GPUs .*; lower engine\.actors to"),
        (["trainer.workers=9"], NODE, r"is 9, but only 8 GPUs are free for them; set trainer\.workers=8 or add nodes"),
        (["engine.args.tensor_parallel_size=4"], NODE, r"gpus_per_actor: is \d, but engine\.args splits .* over 4 GPUs; set"),
        (["engine.args.tensor_parallel_size=3", "engine.gpus_per_actor=3"], NODE,
         "is 3, which does not divide the model's"),
        (["engine.args.tensor_parallel_size=16", "engine.gpus_per_actor=16"], FOUR, "an engine runs on one node; lower"),
        (["engine.release_for_training=false"], NODE, r"only 0 GPUs are free for them: engines and scorers keep theirs"),
    ],
)  # fmt: skip
def test_what_finds_no_place_is_refused_with_the_way_out(load, overrides, cluster, said):
    config, shape, scorers = load(*overrides)
    found = fitting.fit_errors(config, shape, scorers, cluster)
    assert any(re.search(said, fault) for fault in found), found


@pytest.mark.parametrize(
    ("overrides", "cluster", "knob"),
    [
        (["trainer.gradient_checkpointing=false"], NODE, "trainer.gradient_checkpointing=True"),
        (["scorer.batch_size=24", "scorer.dtype=float32"], NODE, "scorer.dtype=bfloat16"),
        (["scorer.batch_size=128"], NODE, "scorer.batch_size="),
        (["engine.args={tensor_parallel_size=1,gpu_memory_utilization=0.2}", "engine.gpus_per_actor=1"], NODE, "engine."),
        (["trainer.workers=2"], NODE, "trainer.workers="),
    ],
)
def test_what_takes_too_much_is_refused_with_a_change_that_fits(load, overrides, cluster, knob):
    config, shape, scorers = load(*overrides)
    (fault,) = fitting.fit_errors(config, shape, scorers, cluster)
    assert f"; with {knob}" in fault
    change = [c.replace("True", "true") for c in re.findall(r"[a-z_.]+=[\w.]+", fault.partition("; with ")[2])]
    kept = [o for o in overrides if o.partition("=")[0] not in {c.partition("=")[0] for c in change}]
    mended, _, _ = load(*kept, *change)
    assert fitting.fit_errors(mended, shape, scorers, cluster) == []


def test_a_model_beyond_the_cluster_is_told_what_was_tried(load):
    config, shape, scorers = load()
    huge = dataclasses.replace(shape, layers=2000)
    found = fitting.fit_errors(config, huge, scorers, NODE)
    assert any("none of these changes alone is enough: " in fault and "larger GPUs" in fault for fault in found)


def test_a_recipe_without_gpus_and_a_cluster_that_nobody_names_are_not_sized(folders, recipe):
    small = config_load.load(recipe())
    assert estimate.report(small, 0, None) == ([], [])
    assert estimate.report(small, 0, NODE)[0] == ["memory     not estimated: the recipe uses no GPU"]
    large = config_load.load(ROOT / "jobs/recipes/llama31_8b.toml", folders)
    assert estimate.report(large, 0, None)[0][0].startswith("memory     not estimated: give --nodes")


def test_a_hub_name_that_the_hub_does_not_give_is_one_sentence(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no way out")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    config = config_load.load(ROOT / "jobs/recipes/llama31_8b.toml")
    lines, found = estimate.report(config, 0, NODE)
    assert lines[0] == (
        "memory     not estimated: model.path: the config.json of meta-llama/Llama-3.1-8B cannot be downloaded from the "
        "hub (ConnectionError), so its memory is unknown; give a folder that has it"
    )
    assert found == []


def test_the_command_ends_with_exit_code_five_after_the_table(folders, capsys, tmp_path):
    arguments = ["--plan", "--nodes", "1", "--gpu-memory-gib", "16", "--run", str(tmp_path / "run"), *folders]
    assert main([str(ROOT / "jobs/recipes/llama31_8b.toml"), *arguments]) == 5
    said = capsys.readouterr()
    assert "GiB of one GPU" in said.out
    assert "does not fit: " in said.out
    assert said.err.startswith("error: the recipe does not fit: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--nodes", "--gpus-per-node", "--gpu-memory-gib"])
def test_a_cluster_of_nothing_is_refused_by_the_parser(flag, capsys):
    with pytest.raises(SystemExit):
        parse(["recipe.toml", flag, "0"])
    assert f"argument {flag}: invalid number above 0" in capsys.readouterr().err


def test_separate_forwards_of_8192_tokens_do_not_fit_where_trees_do(load):
    for forward, fits in (("separate", False), ("tree", True)):
        config, shape, _ = load(f"trainer.forward={forward}")
        assert sizing.training_memory(config, config.training, shape, NODE).fits is fits


def test_engines_of_a_further_model_are_placed_and_weighed_by_its_name(load, folders):
    path = folders[0].partition("=")[2]
    critic = ["strategy.name=my:own", f"models.critic.path={path}", "models.critic.gpus_per_actor=1.0"]
    config, shape, scorers = load(*critic)
    free = sum(part.actors * part.gpus_per_actor for part in (config.engine, config.scorer))
    assert free == 8, "the shipped recipe fills the node"
    errors = fitting.fit_errors(config, shape, scorers, NODE, {"critic": shape})
    assert any(error.startswith("engine.actors: 6 engines of 1 GPUs") for error in errors), errors
    fewer = [*critic, "engine.actors=5"]
    assert fitting.fit_errors(*load(*fewer), NODE, {"critic": shape}) == []
    (said,) = fitting.fit_errors(
        *load(*fewer[:-1], "engine.actors=4", "models.critic.gpus_per_actor=2.0"), NODE, {"critic": shape}
    )
    assert said.startswith("models.critic.gpus_per_actor: is 2, but models.critic.args splits an engine over 1 GPUs")
    kept = [*fewer, "engine.release_for_training=false", "trainer.workers=1"]
    assert any("only 0 GPUs are free" in error for error in fitting.fit_errors(*load(*kept), NODE, {"critic": shape}))
    small = dataclasses.replace(NODE, gpu_memory_gib=16.0)
    errors = fitting.fit_errors(*load(*fewer, "models.critic.context_tokens=65536"), small, {"critic": shape})
    assert any(error.startswith("models.critic: needs ") for error in errors)
    lines, _ = estimate.report(load(*fewer)[0], 100, NODE)
    assert any(line.startswith("  models.critic ") for line in lines)
