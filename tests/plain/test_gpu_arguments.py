"""What the 8B recipes hand to vLLM, Ray Train and DeepSpeed on GPUs, caught where the libraries would take it."""

import sys
import types

import pytest

from evolve_ray.config.load import load
from evolve_ray.config.resolve import flatten, resolved
from evolve_ray.errors import UserError
from evolve_ray.generate import worker
from evolve_ray.generate.spec import GenerateSpec
from evolve_ray.generate.vllm import VllmEngine
from evolve_ray.refine.template import load_template
from evolve_ray.store.run import Run, Stage
from evolve_ray.train.schedule import micro_steps
from evolve_ray.train.spec import TrainSpec, deepspeed_config
from evolve_ray.train.trainings import torch_trainer
from tests.plain.processes import ROOT

NODES = {1: "llama31_8b.toml", 4: "llama31_8b_4nodes.toml"}


def recipe(nodes, *overrides):
    return load(ROOT / "jobs/recipes" / NODES[nodes], overrides)


def module(monkeypatch, name, **members):
    """A stand-in for a heavy module."""
    made = types.ModuleType(name)
    made.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def caught(monkeypatch):
    """Arguments of every class and function that the stand-ins were called with, by name."""
    found = {}

    def catch(name):
        def call(*args, **kwargs):
            found[name] = kwargs | ({"args": args} if args else {})
            engine = types.SimpleNamespace(engine_core=None)  # of a vLLM in one process
            return types.SimpleNamespace(llm_engine=engine, **kwargs)

        return call

    names = ("FailureConfig", "RunConfig", "ScalingConfig")
    module(monkeypatch, "ray")
    module(monkeypatch, "ray.train", **{name: catch(name) for name in names})
    module(monkeypatch, "ray.train.torch", TorchConfig=catch("TorchConfig"), TorchTrainer=catch("TorchTrainer"))
    module(monkeypatch, "vllm", LLM=catch("LLM"), SamplingParams=catch("SamplingParams"))
    module(monkeypatch, "vllm.sampling_params", RequestOutputKind=types.SimpleNamespace(FINAL_ONLY="final"))
    return found


def engine_spec(config):
    return GenerateSpec(
        prompts="", work="", key="", shard_prompts=1, model="/models/8b", model_hash="", dtype=config.model.dtype,
        context_tokens=config.model.context_tokens, template=load_template("default", "conversation", "chain"),
        strategy=config.strategy, sampling=config.sampling, engine=config.engine, seed=0, scope=1,
    )  # fmt: skip


def train_spec(config, folder):
    return TrainSpec(
        pairs="", model="", reference_model="", reference_hash="", dtype=config.model.dtype,
        template=load_template("default", "conversation", "chain"), training=config.training, trainer=config.trainer, seed=0,
        iteration=1, run=Run(folder), reference=None, checkpoint=Stage(folder / "checkpoint", "checkpoint", "key"),
    )  # fmt: skip


@pytest.mark.parametrize("nodes", NODES)
def test_vllm_gets_dtype_context_seats_and_every_engine_argument(caught, nodes):
    config = recipe(nodes, "engine.args.tensor_parallel_size=4", 'engine.args.distributed_executor_backend="mp"')
    VllmEngine(engine_spec(config), types.SimpleNamespace(stop_ids=[1]))
    assert caught["LLM"] == {
        "model": "/models/8b", "dtype": "bfloat16", "max_model_len": 8192, "max_num_seqs": 256, "disable_log_stats": True,
        "tensor_parallel_size": 4, "gpu_memory_utilization": 0.9, "enable_prefix_caching": True, "enable_chunked_prefill": True,
        "max_num_batched_tokens": 16384, "enforce_eager": False, "distributed_executor_backend": "mp",
    }  # fmt: skip


def test_an_argument_that_vllm_does_not_know_is_refused_by_its_name(caught, monkeypatch):
    def refuse(**given):
        raise TypeError("EngineArgs.__init__() got an unexpected keyword argument 'tensor_paralel_size'")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuse)
    config = recipe(1, "engine.args.tensor_paralel_size=2")
    with pytest.raises(UserError, match=r"engine\.args: vLLM does not accept them: .*'tensor_paralel_size'"):
        VllmEngine(engine_spec(config), types.SimpleNamespace(stop_ids=[1]))


@pytest.mark.parametrize(("nodes", "actors"), [(1, 6), (4, 24)])
def test_engines_take_whole_gpus_and_their_environment(nodes, actors):
    pool = worker.engine_pool(recipe(nodes, 'engine.env.NCCL_P2P_DISABLE="1"').engine)
    assert (pool.actors, pool.gpus, pool.cpus) == (actors, 1.0, 4.0)
    assert pool.env["NCCL_P2P_DISABLE"] == "1"
    assert pool.env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.parametrize(("nodes", "workers"), [(1, 8), (4, 32)])
def test_ray_train_gets_a_gpu_a_worker_nccl_and_the_environment(caught, tmp_path, nodes, workers):
    config = recipe(nodes, "trainer.env.NCCL_SOCKET_IFNAME=eth0")
    torch_trainer(config.trainer, tmp_path, "trainings", print)
    assert caught["TorchConfig"] == {"backend": "nccl"}
    assert caught["ScalingConfig"] == {
        "num_workers": workers, "use_gpu": True, "resources_per_worker": {"CPU": 4, "GPU": 1},
    }  # fmt: skip
    assert caught["RunConfig"]["worker_runtime_env"]["env_vars"] == {
        "DS_ACCELERATOR": "cuda", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_DEBUG": "WARN",
        "NCCL_SOCKET_IFNAME": "eth0", "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip


def test_without_gpus_it_is_gloo_on_the_cpu(caught, tmp_path):
    config = load(ROOT / "jobs/recipes/tiny.toml")
    torch_trainer(config.trainer, tmp_path, "trainings", print)
    assert caught["TorchConfig"] == {"backend": "gloo"}
    assert caught["ScalingConfig"]["resources_per_worker"] == {"CPU": 0.4}
    assert caught["RunConfig"]["worker_runtime_env"]["env_vars"] == {"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(("nodes", "accumulation"), [(1, 8), (4, 2)])
def test_deepspeed_gets_bfloat16_zero_3_and_one_global_batch(tmp_path, nodes, accumulation):
    config = recipe(nodes)
    made = deepspeed_config(train_spec(config, tmp_path))
    assert micro_steps(config.training, config.trainer.workers) == accumulation
    assert made["train_batch_size"] == config.training.batch_pairs == 64
    assert made["gradient_accumulation_steps"] == accumulation
    assert made["bf16"] == {"enabled": True}
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "overlap_comm": True, "contiguous_gradients": True}
    assert made["zero_optimization"] == zero


def test_both_recipes_are_the_same_experiment():
    """Only where and how fast it computes differs, and the size of a shard."""
    one, four = (flatten(resolved(recipe(nodes), runtime=False)) for nodes in NODES)
    assert {name for name in one if one[name] != four[name]} == {"name", "engine.shard_prompts", "trainer.workers"}
