"""Every option of a run: strict, frozen, in one place.

A recipe is a TOML file with the sections below. An unknown key, a wrong type or a value out of range is refused with the
file, the line and the nearest name, before anything heavy is imported. Fields marked `runtime` change where and how fast
a run computes, never what: they are no part of a stage's key and may differ when a run is resumed.
"""

from dataclasses import dataclass, field

from evolve_ray.config.option import option


@dataclass(frozen=True)
class Toy:
    """The tiny world: models and data made on the spot; recipes name its parts as `toy:base`, `toy:train`, ..."""

    seed: int = option(0, low=0)
    hidden: int = option(96, low=8)
    layers: int = option(3, low=1)
    heads: int = option(4, low=1)
    base_steps: int = option(550, low=1)
    reward_model_steps: int = option(120, low=1)
    num_train: int = option(12000, low=1)
    num_heldout: int = option(500, low=1)
    num_out_of_domain: int = option(250, low=1)
    num_triples: int = option(16000, low=1)


@dataclass(frozen=True)
class Model:
    """The policy to start from: a Hugging Face folder or name, or `toy:base`."""

    path: str = option()
    dtype: str = option("float32", choices=("float32", "bfloat16"))
    context_tokens: int = option(4096, low=16)


@dataclass(frozen=True)
class Source:
    """A table of prompts: a JSONL or Parquet file, or a `datasets` name or folder; columns named as in the file.

    `answer_pattern`: the first group of its last match in the answer column is the answer (empty: the whole column).
    """

    path: str = option()
    split: str = option("train")
    prompt_column: str = option("prompt")
    answer_column: str = option("")
    answer_pattern: str = option("")
    id_column: str = option("")


@dataclass(frozen=True)
class Prompts(Source):
    """Training prompts; each iteration takes `per_iteration` fresh ones."""

    per_iteration: int = option(5000, low=1)
    max_rejected_fraction: float = option(0.0, low=0.0, high=1.0)


@dataclass(frozen=True)
class Template:
    """How prompts, drafts and the refinement instruction become chat messages."""

    name: str = option("default")
    layout: str = option("conversation", choices=("conversation", "one_message"))


@dataclass(frozen=True)
class Strategy:
    """What a generation strategy asks of the model for one prompt.

    `stop_unchanged`, `stop_right`: a `chain` of training data ends where a refinement equals its draft, or where the verifier
    gives a draft its full mark (1.0). Rounds left out are rows of kind `skipped`, which are neither scored nor selected.
    """

    name: str = option("chain", choices=("chain", "parallel", "few_shot", "critique", "best_of"), plug=True)
    rounds: int = option(4, low=1)
    samples: int = option(4, low=1)  # of `parallel`, and of each round of `best_of`
    shots: int = option(3, low=1)  # earlier responses that `few_shot` shows
    show: str = option("last", choices=("last", "best"))  # which of them
    stop_unchanged: bool = option(False)
    stop_right: bool = option(False)


@dataclass(frozen=True)
class Sampling:
    """Sampling of every response."""

    temperature: float = option(1.0, low=0.0)
    top_p: float = option(1.0, above=0.0, high=1.0)
    max_tokens: int = option(1024, low=1)


@dataclass(frozen=True)
class Engine:
    """The pool of inference engines. `args` go to vLLM as they are; `env` is set before its processes start.

    An engine that finishes no response for `stall_s` is ended and started again; a shard may kill or hang its engine
    `max_restarts` times. The stage stops when more than `max_rejected_fraction` of its prompts are rejected.

    With `release_for_training` the engines (and scorers) end before a training starts, so that both can take turns on the
    same GPUs; without it they stay and get new weights in place.
    """

    name: str = option("vllm", choices=("vllm",), plug=True)
    actors: int = option(1, low=1, runtime=True)
    cpus_per_actor: float = option(1.0, low=0.0, runtime=True)
    gpus_per_actor: float = option(0.0, low=0.0, runtime=True)
    shard_prompts: int = option(256, low=1)
    max_num_seqs: int = option(256, low=1)
    max_restarts: int = option(3, low=0, runtime=True)
    stall_s: float = option(1800.0, above=0.0, runtime=True)
    max_rejected_fraction: float = option(0.1, low=0.0, high=1.0, runtime=True)
    release_for_training: bool = option(True, runtime=True)
    args: dict = option({})
    env: dict = option({}, runtime=True)


@dataclass(frozen=True)
class Scorer:
    """What a response is worth: a reward model, the verifier, `module:Name`, or the mean or minimum of several.

    `members` of a mean or minimum: `"verifier"`, `"module:Name"` or `"reward_model=FOLDER_OR_NAME"`, all in one actor.
    `stall_s` and `max_restarts` as of [engine], by shard; the stage stops when more than `max_rejected_fraction` of the drafts
    get no finite score.
    """

    name: str = option("reward_model", choices=("reward_model", "verifier", "mean", "minimum"), plug=True)
    model: str = option("")
    members: list = option([])
    dtype: str = option("float32", choices=("float32", "bfloat16"))
    max_tokens: int = option(4096, low=16)
    batch_size: int = option(32, low=1)
    actors: int = option(1, low=1, runtime=True)
    cpus_per_actor: float = option(1.0, low=0.0, runtime=True)
    gpus_per_actor: float = option(0.0, low=0.0, runtime=True)
    max_restarts: int = option(3, low=0, runtime=True)
    stall_s: float = option(1800.0, above=0.0, runtime=True)
    max_rejected_fraction: float = option(0.1, low=0.0, high=1.0, runtime=True)


@dataclass(frozen=True)
class Verifier:
    """The checkable answer, if there is one: 1.0 means exactly right.

    `pattern` (of `regex`): its last match in a response, first group where it has one, is compared with the answer.
    `tolerance` (of `numeric`): allowed relative difference of the last number.
    """

    name: str = option("exact", choices=("exact", "regex", "numeric", "math"), plug=True)
    pattern: str = option("")
    tolerance: float = option(1e-9, low=0.0)


@dataclass(frozen=True)
class Refresh:
    """The reward model is trained again in each iteration, on the policy's own drafts in the verifier's order.

    `prompts` of the iteration's prompts are labelled, at most `max_pairs` pairs each.
    """

    prompts: int = option(256, low=1)
    max_pairs: int = option(3, low=1)
    training: "Training" = field(default_factory=lambda: Training(objective="reward"))


@dataclass(frozen=True)
class Selection:
    """How one prompt's scored drafts become preference pairs.

    `pairing` and `margin` (in units of the scorer) are of `reward_model`: best over worst draft, or the better over the worse
    of neighbouring rounds. The last three are the guards of `rule`: edit similarity, ratio of lengths, repeated 4-grams.
    """

    name: str = option("reward_model", choices=("reward_model", "rule", "random"), plug=True)
    pairing: str = option("extremes", choices=("extremes", "neighbours"))
    margin: float = option(0.0, low=0.0)
    max_pairs: int = option(1, low=1)
    allow_cut: bool = option(False)
    max_similarity: float = option(0.98, above=0.0, high=1.0)
    max_length_ratio: float = option(2.0, low=1.0)
    max_repetition: float = option(0.3, low=0.0, high=1.0)


@dataclass(frozen=True)
class Training:
    """One phase of training: objective and optimiser. `batch_pairs` is global; `micro_pairs` is per worker.

    `reference`: the policy that this phase starts from (`iteration`), or the one that iteration 1 started from (`initial`).
    """

    objective: str = option("evolve", choices=("sft", "dpo", "ipo", "srpo", "evolve", "reward"), plug=True)
    alpha: float = option(0.5, low=0.0, high=1.0)
    beta: float = option(0.1, above=0.0)
    refine_form: str = option("squared", choices=("squared", "logistic"))
    refine_weight: float = option(1.0, low=0.0)  # of the refinement term of `sft`
    label_smoothing: float = option(0.0, low=0.0, high=0.5)
    length_normalised: bool = option(False)
    nll: float = option(0.0, low=0.0)
    reference: str = option("iteration", choices=("iteration", "initial"))
    epochs: int = option(1, low=1)
    batch_pairs: int = option(32, low=1)
    micro_pairs: int = option(4, low=1)
    learning_rate: float = option(5e-7, above=0.0)
    warmup_fraction: float = option(0.1, low=0.0, high=1.0)
    schedule: str = option("cosine", choices=("cosine", "linear", "constant"))
    weight_decay: float = option(0.0, low=0.0)
    gradient_clip: float = option(1.0, above=0.0)


@dataclass(frozen=True)
class Preferences:
    """Given preference triples (prompt, chosen, rejected) and the training on them."""

    path: str = option()
    split: str = option("train")
    prompt_column: str = option("prompt")
    chosen_column: str = option("chosen")
    rejected_column: str = option("rejected")
    limit: int = option(0, low=0)
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class Trainer:
    """The Ray Train worker group. `deepspeed` is merged into the DeepSpeed configuration.

    A training without a step, stored or done, for `stall_s` ends the run.
    `forward`: the sequences of a pair are read as a `tree`, what they share once, packed up to `max_tokens` tokens (padding
    counted) and `micro_pairs` pairs a forward; or `separate`, a row each, `micro_pairs` pairs a forward. The values are the same.
    `lora_rank` (0: all weights): adapters are trained and merged at the end; a reward model is always trained whole.
    """

    workers: int = option(1, low=1)
    use_gpu: bool = option(False)
    cpus_per_worker: float = option(1.0, low=0.0, runtime=True)
    checkpoint_steps: int = option(50, low=1, runtime=True)
    max_failures: int = option(3, low=0, runtime=True)
    stall_s: float = option(7200.0, above=0.0, runtime=True)
    forward: str = option("separate", choices=("tree", "separate"))
    max_tokens: int = option(16384, low=1)
    gradient_checkpointing: bool = option(False)
    lora_rank: int = option(0, low=0)
    lora_alpha: int = option(32, low=1)
    deepspeed: dict = option({})
    env: dict = option({}, runtime=True)


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts by split name (`[evaluation.splits]`), refined in a chain and reported by round.

    `parallel` (0: none) independent first drafts are sampled beside the chain: the best of them against the chain's best.
    """

    splits: dict = option({})
    prompt_column: str = option("prompt")
    answer_column: str = option("")
    answer_pattern: str = option("")
    split: str = option("train")
    rounds: int = option(4, low=1)
    temperature: float = option(1.0, low=0.0)
    limit: int = option(0, low=0)
    parallel: int = option(0, low=0)


@dataclass(frozen=True)
class Probe:
    """After each iteration, `prompts` (0: none) of its prompts are answered by the engine with the new weights.

    The engine's log-probabilities of those tokens must agree with the checkpoint's within `tolerance` (mean absolute
    difference, nats a token); the same forwards give the KL to the iteration's start and to the initial policy.
    """

    prompts: int = option(16, low=0)
    tolerance: float = option(0.05, above=0.0)
    cpus: float = option(1.0, low=0.0, runtime=True)
    gpus: float = option(0.0, low=0.0, runtime=True)


@dataclass(frozen=True)
class Controller:
    """Whether the run goes on after an iteration; decided on the evaluation split `split` ("": the first one).

    `fixed`: always. `plateau`: until `patience` iterations in a row bring no significant improvement of the last round or of
    its gain over the first. `guard`: until the reward of the last round rises while its exact match falls, or the first round
    falls (all significantly, against the model before), or the last round's mean tokens are more than `max_length_ratio`
    times longer or shorter, or its distinct-2 less than `min_distinct_ratio` times, those of the policy that iteration 1
    started from, or the KL to that policy is above `max_kl` (nats a response, of [probe]; 0: no limit). Then `on_breach`:
    `stop` keeps the iteration, `roll_back` ends with the policy before it.
    """

    name: str = option("fixed", choices=("fixed", "plateau", "guard"), plug=True)
    split: str = option("")
    patience: int = option(1, low=1)
    on_breach: str = option("roll_back", choices=("stop", "roll_back"))
    max_length_ratio: float = option(2.0, above=1.0)
    min_distinct_ratio: float = option(0.5, low=0.0, high=1.0)
    max_kl: float = option(0.0, low=0.0)


@dataclass(frozen=True)
class Trackers:
    """Where a run's figures also go (`tensorboard`, `mlflow`, `wandb`; []: nowhere), and the name of its project there."""

    use: list = option(["tensorboard"], runtime=True)
    project: str = option("evolve-ray", runtime=True)


@dataclass(frozen=True)
class RayOptions:
    """The local Ray that is started where no cluster is named by RAY_ADDRESS."""

    num_cpus: int = option(0, low=0, runtime=True)
    object_store_mib: int = option(512, low=80, runtime=True)
    dashboard: bool = option(True, runtime=True)


@dataclass(frozen=True)
class Config:
    """A whole recipe."""

    prompts: Prompts
    model: Model
    name: str = option("run")
    seed: int = option(0, low=0)
    iterations: int = option(3, low=0, runtime=True)
    toy: Toy | None = None
    activation: Preferences | None = None
    offline: Preferences | None = None
    template: Template = field(default_factory=Template)
    strategy: Strategy = field(default_factory=Strategy)
    sampling: Sampling = field(default_factory=Sampling)
    engine: Engine = field(default_factory=Engine)
    scorer: Scorer = field(default_factory=Scorer)
    verifier: Verifier | None = None
    refresh: Refresh | None = None
    selection: Selection = field(default_factory=Selection)
    training: Training = field(default_factory=Training)
    trainer: Trainer = field(default_factory=Trainer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    probe: Probe = field(default_factory=Probe)
    controller: Controller = field(default_factory=Controller)
    trackers: Trackers = field(default_factory=Trackers, metadata={"runtime": True})
    ray: RayOptions = field(default_factory=RayOptions)


def texts_in_view(strategy: Strategy) -> int:
    """Responses that one context of a strategy can hold, the one being written included."""
    return {"few_shot": strategy.shots + 1, "critique": 3}.get(strategy.name, 2)


def trainings(config: Config) -> list[tuple[str, Training]]:
    """Every phase of training of a recipe, with the name of its table."""
    parts = (("activation", config.activation), ("offline", config.offline), ("refresh", config.refresh))
    return [("training", config.training), *((f"{name}.training", part.training) for name, part in parts if part)]
