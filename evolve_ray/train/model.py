"""The model of a rank under DeepSpeed ZeRO-3."""

from typing import Any

from evolve_ray.train import deepspeed_ops
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.spec import TrainSpec, deepspeed_config


class ShardedModel:
    """The model that this rank trains or reads. It holds one model at a time, so a second one never needs memory.

    `engine` is the DeepSpeed engine, `module` the transformers model inside it, and `folder` the folder it was loaded from. With
    `trees` the engine takes trees (`logprobs.TreeModel`), and `chunked` is whether its logits may be computed in chunks. With
    `classifier` it is a reward model, not a causal language model.
    """

    def __init__(self, spec: TrainSpec, collectives: Collectives, *, classifier: bool, trees: bool):
        import deepspeed

        self.deepspeed, self.spec, self.collectives = deepspeed, spec, collectives
        self.classifier, self.trees, self.chunked = classifier, trees, True
        self.engine: Any = None
        self.module: Any = None
        self.folder = ""
        # Training never calls this all-reduce for inference, but DeepSpeed would compile it now, which takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if spec.trainer.use_gpu else "gloo", auto_mpi_discovery=False, verbose=False
        )

    @deepspeed_ops.explain_errors()
    def load(self, folder: str, *, frozen: bool = False) -> None:
        """Loads the model in `folder` in place of the present one; a `frozen` model has no optimiser and no adapters."""
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers.integrations import HfDeepSpeedConfig

        from evolve_ray.train import adapters, dropout, tree_check

        self.unload()
        trainer, ds_config = self.spec.trainer, deepspeed_config(self.spec)
        if frozen:
            ds_config.pop("optimizer")
        self._keep = HfDeepSpeedConfig(ds_config)  # while it lives, from_pretrained loads straight into ZeRO-3 shards
        model_class = AutoModelForSequenceClassification if self.classifier else AutoModelForCausalLM
        module = model_class.from_pretrained(folder, dtype=getattr(torch, self.spec.dtype), trust_remote_code=False)
        if trainer.gradient_checkpointing and not frozen:
            module.gradient_checkpointing_enable()
        if trainer.lora_rank and not frozen and not self.classifier:
            adapters.add_adapters(module, trainer, self.spec.seed)
        parameters = None if frozen else [parameter for parameter in module.parameters() if parameter.requires_grad]
        forward = tree_check.tree_model(module, self.collectives.device) if self.trees else module
        self.engine, *_ = self.deepspeed.initialize(model=forward, model_parameters=parameters, config=ds_config)
        self.module, self.folder = module, folder
        dropout.load_without_dropout(
            module, lambda: self.few_values(forward), "scorer.model" if self.classifier else "model.path"
        )
        if self.trees:
            whole_logits = not tree_check.check_tree(self.engine, forward, self.collectives.device)
            self.chunked = not any(self.collectives.all_max([whole_logits]))

    def few_values(self, forward: Any) -> Any:
        """The logits or the score of a few tokens, by the engine as it trains."""
        import torch

        from evolve_ray.score.reward_model import classify
        from evolve_ray.train import tree_check

        vocabulary = self.module.get_input_embeddings().num_embeddings
        ids = [(7 * position + 1) % vocabulary for position in range(12)]
        if self.classifier:
            return classify(self.engine, [ids], self.collectives.device)
        if self.trees:
            return tree_check.few_logps(self.engine, ids, self.collectives.device)
        return self.engine(input_ids=torch.tensor([ids], device=self.collectives.device)).logits

    def unload(self) -> None:
        """Frees the memory of the model."""
        import gc

        if self.engine is not None:
            self.engine.destroy()
            self.engine = None
            gc.collect()

    def gathered(self, parameters: list[Any]) -> Any:
        """A context in which the whole parameters are available instead of this rank's shards; all ranks must enter it."""
        return self.deepspeed.zero.GatheredParameters(parameters)
