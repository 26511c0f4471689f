"""Training: objectives and optimiser, the worker group, given preferences, a reward model that is trained again."""

from dataclasses import dataclass, field

from evolve_ray.config.option import option, section


@dataclass(frozen=True)
class Training:
    """One phase of training: objective and optimiser."""

    objective: str = option(
        "the loss; `reward` is for [refresh] alone",
        "evolve",
        choices=("sft", "dpo", "ipo", "srpo", "evolve", "reward"),
        plug=True,
    )
    alpha: float = option("weight of the refinement term of `evolve`; 0 is DPO, 1 is SRPO", 0.5, low=0.0, high=1.0)
    beta: float = option("strength of the pull to the reference policy", 0.1, above=0.0)
    refine_form: str = option("form of the refinement term", "squared", choices=("squared", "logistic"))
    refine_weight: float = option("of `sft`: weight of the refinement term", 1.0, low=0.0)
    label_smoothing: float = option("probability that a preference is the wrong way round", 0.0, low=0.0, high=0.5)
    length_normalised: bool = option("log-probabilities are means over response tokens, not sums", False)
    nll: float = option("weight of the negative log-likelihood of a chosen token after the prompt", 0.0, low=0.0)
    reference: str = option(
        "the policy that this phase starts from, or the one that iteration 1 started from",
        "iteration",
        choices=("iteration", "initial"),
    )
    epochs: int = option("times over the pairs", 1, low=1)
    batch_pairs: int = option("pairs of one optimiser update, over all workers", 32, unit="rows", low=1)
    micro_pairs: int = option("pairs of one forward of one worker", 4, unit="rows", low=1)
    learning_rate: float = option("peak learning rate of AdamW", 5e-7, above=0.0)
    warmup_fraction: float = option("share of the steps with a rising learning rate", 0.1, low=0.0, high=1.0)
    schedule: str = option("learning rate after the warm-up", "cosine", choices=("cosine", "linear", "constant"))
    weight_decay: float = option("weight decay of AdamW", 0.0, low=0.0)
    gradient_clip: float = option("largest norm of the gradient", 1.0, above=0.0)


@dataclass(frozen=True)
class Refresh:
    """The reward model is trained again in each iteration, on the policy's own drafts in the verifier's order."""

    prompts: int = option("prompts of the iteration whose drafts are labelled", 256, unit="rows", low=1)
    max_pairs: int = option("pairs of one prompt at most", 3, unit="rows", low=1)
    training: Training = field(default_factory=lambda: Training(objective="reward"))


@dataclass(frozen=True)
class Preferences:
    """Given preference triples (prompt, chosen, rejected) and the training on them."""

    path: str = option("a JSONL, JSON or Parquet file, or a `datasets` name or folder")
    split: str = option("split of a `datasets` name or folder", "train")
    prompt_column: str = option("column with the prompt", "prompt")
    chosen_column: str = option("column with the preferred response", "chosen")
    rejected_column: str = option("column with the dispreferred response", "rejected")
    limit: int = option("use the first rows only; 0: all", 0, unit="rows", low=0)
    training: Training = section(Training)


@dataclass(frozen=True)
class Trainer:
    """The Ray Train worker group."""

    workers: int = option("ZeRO-3 workers; with GPUs one each", 1, low=1)
    use_gpu: bool = option("each worker has a GPU", False)
    cpus_per_worker: float = option("CPUs that Ray reserves for a worker", 1.0, low=0.0, runtime=True)
    checkpoint_steps: int = option("a step is stored every so many, to resume from", 50, unit="steps", low=1, runtime=True)
    max_failures: int = option("times that a training may lose processes and start again", 3, low=0, runtime=True)
    stall_s: float = option(
        "a training without a step, done or stored, for so long ends the run", 7200.0, unit="s", above=0.0, runtime=True
    )
    forward: str = option(
        "`tree`: what the sequences of a pair share is computed once; `separate`: a padded row for each; the values are the same",
        "separate",
        choices=("tree", "separate"),
    )
    max_tokens: int = option("of `tree`: tokens of one forward, padding counted", 16384, unit="tokens", low=1)
    gradient_checkpointing: bool = option("activations are computed again in the backward pass, to save memory", False)
    lora_rank: int = option("rank of LoRA adapters, merged at the end; 0: all weights are trained", 0, low=0)
    lora_alpha: int = option("scale of LoRA adapters: alpha / rank", 32, low=1)
    deepspeed: dict = option("merged into the DeepSpeed configuration, as it is", {})
    env: dict = option("environment variables of the workers", {}, runtime=True)
