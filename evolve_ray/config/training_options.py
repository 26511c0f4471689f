"""Options of training: objective and optimiser, the worker group, preference triples, refreshing the reward model."""

from dataclasses import dataclass, field

from evolve_ray.config.option import option, section


@dataclass(frozen=True)
class Training:
    """One phase of training: objective and optimiser."""

    objective: str = option(
        "the loss; `reward` is only for [refresh]",
        "evolve",
        choices=("sft", "dpo", "ipo", "srpo", "evolve", "policy_gradient", "turns_dpo", "turns_sft", "reward"),
        plug=True,
    )
    alpha: float = option("weight of the refinement term of `evolve`; 0 is DPO, 1 is SRPO", 0.5, low=0.0, high=1.0)
    beta: float = option("strength of the pull to the reference policy", 0.1, above=0.0)
    refine_form: str = option("form of the refinement term", "squared", choices=("squared", "logistic"))
    refine_weight: float = option("for `sft` and `policy_gradient`: weight of the refinement term", 1.0, low=0.0)
    label_smoothing: float = option("assumed probability that chosen and rejected are swapped", 0.0, low=0.0, high=0.5)
    length_normalised: bool = option("true: log-probabilities are means over response tokens; false: sums", False)
    nll: float = option("weight of the negative log-likelihood per token of the chosen response to the prompt", 0.0, low=0.0)
    reference: str = option(
        "reference policy: the one that this training starts from (`iteration`), or the one that iteration 1 starts from "
        "(`initial`)",
        "iteration",
        choices=("iteration", "initial"),
    )
    start: str = option(
        "for [training]: the model that a training starts from: the checkpoint of the iteration before (`iteration`), or the "
        "policy that iteration 1 starts from, anew in every iteration (`initial`); drafts are written by the newest checkpoint",
        "iteration",
        choices=("iteration", "initial"),
        later=True,
    )
    replay: float = option(
        "for [training]: share of a training's rows that come from the pairs of earlier iterations", 0.0, low=0.0, high=1.0,
        later=True,
    )  # fmt: skip
    given: float = option(
        "for [training]: share of a training's rows that are triples of [activation]", 0.0, low=0.0, high=1.0, later=True
    )
    epochs: int = option("passes over the pairs", 1, low=1)
    batch_pairs: int = option("pairs per optimiser update, over all workers", 32, unit="rows", low=1)
    micro_pairs: int = option("pairs per forward of one worker", 4, unit="rows", low=1)
    learning_rate: float = option("peak learning rate of AdamW", 5e-7, above=0.0)
    warmup_fraction: float = option("share of the steps in which the learning rate rises", 0.1, low=0.0, high=1.0)
    schedule: str = option("learning rate after the warm-up", "cosine", choices=("cosine", "linear", "constant"))
    weight_decay: float = option("weight decay of AdamW", 0.0, low=0.0)
    gradient_clip: float = option("largest norm of the gradient", 1.0, above=0.0)
    objective_args: dict = option(
        "for `policy_gradient`: `level`, `clip_low`, `clip_high`, `length`, `length_constant`, `kl`, `kl_to`, `kl_refined`, "
        "`mismatch`, `mismatch_cap`; for `turns_dpo`: `turns`; for `turns_sft`: `weights`; for one of your own: its options, as "
        "`args` of the loss",
        {},
        later=True,
    )


@dataclass(frozen=True)
class Refresh:
    """Trains the reward model again in each iteration, on drafts of the policy that the verifier orders."""

    prompts: int = option("prompts of the iteration whose drafts the verifier labels", 256, unit="rows", low=1)
    max_pairs: int = option("largest number of pairs per prompt", 3, unit="rows", low=1)
    training: Training = field(default_factory=lambda: Training(objective="reward"))


@dataclass(frozen=True)
class Preferences:
    """Preference triples (prompt, chosen, rejected) from a file, and the training on them."""

    path: str = option("a JSONL, JSON or Parquet file, or a `datasets` name or folder")
    split: str = option("split of a `datasets` name or folder", "train")
    prompt_column: str = option("column with the prompt", "prompt")
    chosen_column: str = option("column with the chosen response", "chosen")
    rejected_column: str = option("column with the rejected response", "rejected")
    limit: int = option("use the first rows only; 0: all", 0, unit="rows", low=0)
    training: Training = section(Training)


@dataclass(frozen=True)
class Trainer:
    """The Ray Train worker group."""

    workers: int = option("number of ZeRO-3 workers", 1, low=1)
    use_gpu: bool = option("true: each worker has one GPU; false: the workers use CPUs", False)
    cpus_per_worker: float = option("CPUs that Ray reserves for each worker", 1.0, low=0.0, runtime=True)
    checkpoint_steps: int = option(
        "steps between stored steps, from which a training resumes", 50, unit="steps", low=1, runtime=True
    )
    max_failures: int = option("times that a training may lose a process and restart", 3, low=0, runtime=True)
    stall_s: float = option(
        "deadline: the run ends if no step of a training is done or stored for this long",
        7200.0,
        unit="s",
        above=0.0,
        runtime=True,
    )
    forward: str = option(
        "`tree`: the tokens that the sequences of a pair have in common are computed once; `separate`: one padded row per "
        "sequence; both give the same values",
        "separate",
        choices=("tree", "separate"),
    )
    max_tokens: int = option("for `tree`: largest number of tokens per forward, padding included", 16384, unit="tokens", low=1)
    gradient_checkpointing: bool = option("recompute activations in the backward pass, to save memory", False)
    lora_rank: int = option("rank of LoRA adapters, which are merged after the training; 0: all weights are trained", 0, low=0)
    lora_alpha: int = option("LoRA adapters are scaled by `lora_alpha / lora_rank`", 32, low=1)
    deepspeed: dict = option("merged into the DeepSpeed configuration unchanged", {})
    env: dict = option("environment variables of the workers", {}, runtime=True)
