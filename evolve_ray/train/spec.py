"""The spec of a training, and its DeepSpeed configuration."""

from dataclasses import dataclass

from evolve_ray.config import options
from evolve_ray.refine.template import Template
from evolve_ray.store.run import Run, Stage
from evolve_ray.train.schedule import micro_steps

VERSION = 2
# Gradients of micro-batches and of ranks are summed in float32: a sum of many bfloat16 numbers loses the small ones.
FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


@dataclass(frozen=True)
class TrainSpec:
    """Everything that a training worker needs, picklable.

    `pairs`, `model` and `reference_model` are paths; `reference` is None for an objective without a reference policy. `output` is
    the number of a reward model's output that is the score. `initial_model` is the path of the policy that iteration 1 starts
    from, for an objective that asks for it. `start_hash` is the content hash of `model` if that is not the newest checkpoint.
    """

    pairs: str
    model: str
    reference_model: str
    reference_hash: str
    dtype: str
    template: Template
    training: options.Training
    trainer: options.Trainer
    seed: int
    iteration: int
    run: Run
    reference: Stage | None
    checkpoint: Stage
    output: int = 0
    initial_model: str = ""
    start_hash: str = ""


def deepspeed_config(spec: TrainSpec) -> dict:
    """The DeepSpeed configuration: ZeRO-3, AdamW, one global batch per update; options of `trainer.deepspeed` override it."""
    training, trainer = spec.training, spec.trainer
    accumulation = micro_steps(training, trainer.workers)
    base = {
        "train_micro_batch_size_per_gpu": training.micro_pairs,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": training.micro_pairs * accumulation * trainer.workers,
        "gradient_clipping": training.gradient_clip,
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": spec.dtype == "bfloat16"},
        **(FLOAT32_SUMS if spec.dtype == "bfloat16" else {}),
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": training.weight_decay,
                "torch_adam": True,
            },
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    return merge(base, trainer.deepspeed)


def merge(base: dict, override: dict) -> dict:
    """Merges two configurations, nested tables too; values of `override` replace those of `base`."""
    merged_tables = {
        key: merge(base[key], override[key])
        for key in base.keys() & override.keys()
        if isinstance(base[key], dict) and isinstance(override[key], dict)
    }
    return base | override | merged_tables
