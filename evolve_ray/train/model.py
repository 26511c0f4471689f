"""A model under ZeRO-3 on this rank."""

from typing import Any

from evolve_ray.train import deepspeed_ops
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.spec import TrainSpec, deepspeed_config


class ShardedModel:
    """The model that this rank trains or reads: one at a time, so that a second one never needs memory.

    `engine` is DeepSpeed's, `module` the transformers model inside it, `folder` where it was loaded from. With `trees` the
    engine reads trees (`logprobs.TreeModel`), and `chunked` says whether its logits may be made in chunks. `classifier`: a
    reward model in place of a causal language model.
    """

    def __init__(self, spec: TrainSpec, collectives: Collectives, *, classifier: bool, trees: bool):
        import deepspeed

        self.deepspeed, self.spec, self.collectives = deepspeed, spec, collectives
        self.classifier, self.trees, self.chunked = classifier, trees, True
        self.engine: Any = None
        self.module: Any = None
        self.folder = ""
        # An all-reduce for inference, which no training calls; DeepSpeed would compile it now, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if spec.trainer.use_gpu else "gloo", auto_mpi_discovery=False, verbose=False
        )

    @deepspeed_ops.refusals_named()
    def load(self, folder: str, *, frozen: bool = False) -> None:
        """The model in `folder`, in place of the one before; a `frozen` one has no optimiser."""
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers.integrations import HfDeepSpeedConfig

        from evolve_ray.train import adapters, tree_check

        self.unload()
        trainer, ds_config = self.spec.trainer, deepspeed_config(self.spec)
        if frozen:
            ds_config.pop("optimizer")
        self._keep = HfDeepSpeedConfig(ds_config)  # while it lives, from_pretrained loads straight into ZeRO-3 shards
        kind = AutoModelForSequenceClassification if self.classifier else AutoModelForCausalLM
        module = kind.from_pretrained(folder, dtype=getattr(torch, self.spec.dtype), trust_remote_code=False)
        if trainer.gradient_checkpointing and not frozen:
            module.gradient_checkpointing_enable()
        module.train()
        if trainer.lora_rank and not frozen and not self.classifier:
            adapters.adapt(module, trainer, self.spec.seed)
        parameters = None if frozen else [parameter for parameter in module.parameters() if parameter.requires_grad]
        forward = tree_check.tree_model(module, self.collectives.device) if self.trees else module
        self.engine, *_ = self.deepspeed.initialize(model=forward, model_parameters=parameters, config=ds_config)
        self.module, self.folder = module, folder
        if self.trees:
            whole_logits = not tree_check.prove(self.engine, forward, self.collectives.device)
            self.chunked = not any(self.collectives.all_max([whole_logits]))

    def unload(self) -> None:
        """Gives the memory of the model back."""
        import gc

        if self.engine is not None:
            self.engine.destroy()
            self.engine = None
            gc.collect()

    def gathered(self, parameters: list[Any]) -> Any:
        """A context in which whole parameters are there in place of this rank's shards; all ranks must enter it."""
        return self.deepspeed.zero.GatheredParameters(parameters)
