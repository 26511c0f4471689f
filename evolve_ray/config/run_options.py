"""Options around the loop: evaluation, the probe, the controller, trackers, the local Ray."""

from dataclasses import dataclass

from evolve_ray.config.option import option

# A true change of 20 points, where three in ten answers change, is seen in 78 of 100 runs with 50 prompts, and in 22 with 12.
MIN_PROMPTS = 50


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts by split (`[evaluation.splits]`); each is answered, refined in a chain, and reported by round."""

    splits: dict = option('`name = "FILE_OR_DATASET"` of each held-out split', {})
    prompt_column: str = option("column with the prompt", "prompt")
    answer_column: str = option("column with the gold answer; empty: there is none", "")
    answer_pattern: str = option("like `prompts.answer_pattern`", "")
    draft_column: str = option("like `prompts.draft_column`; empty: none", "", later=True)
    columns: list = option("like `prompts.columns`", [], later=True)
    split: str = option("split of a `datasets` name or folder", "train")
    rounds: int = option("rounds of the chain", 4, unit="rounds", low=1)
    temperature: float = option("sampling temperature", 1.0, low=0.0)
    limit: int = option("use the first rows of each split only; 0: all", 0, unit="rows", low=0)
    parallel: int = option("independent samples per prompt in addition to the chain, for best of n; 0: none", 0, low=0)
    pick: str = option(
        "also run the recipe's strategy on the held-out prompts and report its final answer: that of the `last` round, the "
        "`best` by the scorer, the `vote` of all answers, or what the strategy `returned` last; empty: only the chain",
        "",
        choices=("", "last", "best", "vote", "returned"),
        later=True,
    )


@dataclass(frozen=True)
class Probe:
    """Checks after each iteration that the log-probabilities of engine and checkpoint agree; it also measures the KL."""

    prompts: int = option("prompts that the engine answers with the new weights; 0: no probe", 16, unit="rows", low=0)
    tolerance: float = option("largest allowed mean absolute difference", 0.05, unit="nats per token", above=0.0)
    cpus: float = option("CPUs that Ray reserves for the probe", 1.0, low=0.0, runtime=True)
    gpus: float = option("GPUs of the probe", 0.0, low=0.0, runtime=True)


@dataclass(frozen=True)
class Controller:
    """Decides after each iteration whether the run continues, by one evaluation split.

    `fixed`: it always continues. `plateau`: it stops when `patience` iterations in a row bring no significant improvement of the
    last round or of its gain over the first. `guard`: it stops when the reward of the last round rises while its exact match
    falls, or when the first round falls (both significantly, against the model before), or when the length, diversity or KL of
    the last round leaves its bounds around that of the start, which is the policy that iteration 1 starts from. Nothing is
    decided from fewer than `min_prompts` prompts.
    """

    name: str = option("the controller", "fixed", choices=("fixed", "plateau", "guard"), plug=True)
    split: str = option("the evaluation split that decides; empty: the first one", "")
    min_prompts: int = option(
        "prompts of the split that a decision needs; with fewer, the run continues", MIN_PROMPTS, low=1, later=True
    )
    patience: int = option("for `plateau`: iterations in a row without improvement after which the run stops", 1, low=1)
    on_breach: str = option(
        "for `guard`: `stop` keeps the iteration and stops, `roll_back` ends the run with the policy before the iteration",
        "roll_back",
        choices=("stop", "roll_back"),
    )
    max_length_ratio: float = option(
        "for `guard`: largest factor by which the mean tokens of the last round may grow or shrink from the start", 2.0, above=1.0
    )
    min_distinct_ratio: float = option(
        "for `guard`: smallest ratio of the distinct-2 of the last round to that of the start", 0.5, low=0.0, high=1.0
    )
    max_kl: float = option("for `guard`: largest KL to the start; 0: no limit", 0.0, unit="nats per response", low=0.0)
    args: dict = option("options of a controller of your own; it gets them as `args`", {}, later=True)


@dataclass(frozen=True)
class Trackers:
    """Trackers that also get the figures of a run."""

    use: list = option("a list of `tensorboard`, `mlflow`, `wandb`; []: none", ["tensorboard"], runtime=True)
    project: str = option("name of the project in the trackers", "evolve-ray", runtime=True)


@dataclass(frozen=True)
class RayOptions:
    """The local Ray, which is started if RAY_ADDRESS names no cluster."""

    num_cpus: int = option("logical CPUs; 0: all CPUs of the machine", 0, low=0, runtime=True)
    object_store_mib: int = option("memory of the object store", 512, unit="MiB", low=80, runtime=True)
    dashboard: bool = option("start the Ray dashboard", True, runtime=True)
