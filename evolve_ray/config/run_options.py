"""Around the loop: evaluation, the probe, when a run ends, trackers, the local Ray."""

from dataclasses import dataclass

from evolve_ray.config.option import option


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts by split name (`[evaluation.splits]`), refined in a chain and reported by round."""

    splits: dict = option('`name = "FILE_OR_DATASET"` of each held-out split', {})
    prompt_column: str = option("column with the prompt", "prompt")
    answer_column: str = option("column with the gold answer; empty: there is none", "")
    answer_pattern: str = option("as `prompts.answer_pattern`", "")
    split: str = option("split of a `datasets` name or folder", "train")
    rounds: int = option("rounds of the chain", 4, unit="rounds", low=1)
    temperature: float = option("sampling temperature", 1.0, low=0.0)
    limit: int = option("use the first rows of each split only; 0: all", 0, unit="rows", low=0)
    parallel: int = option("independent samples beside the chain, for best of n; 0: none", 0, low=0)


@dataclass(frozen=True)
class Probe:
    """After each iteration the engines' log-probabilities must agree with the checkpoint's; the same gives the KL."""

    prompts: int = option("prompts that the engine answers with the new weights; 0: no probe", 16, unit="rows", low=0)
    tolerance: float = option("largest mean absolute difference", 0.05, unit="nats a token", above=0.0)
    cpus: float = option("CPUs that Ray reserves for the probe", 1.0, low=0.0, runtime=True)
    gpus: float = option("GPUs of the probe", 0.0, low=0.0, runtime=True)


@dataclass(frozen=True)
class Controller:
    """Whether the run goes on after an iteration, decided on one evaluation split.

    `fixed`: always. `plateau`: until `patience` iterations in a row bring no significant improvement of the last round or of
    its gain over the first. `guard`: until the reward of the last round rises while its exact match falls, or the first round
    falls (all significantly, against the model before), or length, diversity or KL of the last round leave their bounds around
    those of the start, the policy that iteration 1 started from.
    """

    name: str = option("when a run ends", "fixed", choices=("fixed", "plateau", "guard"), plug=True)
    split: str = option("the evaluation split that decides; empty: the first one", "")
    patience: int = option("of `plateau`: iterations in a row without improvement", 1, low=1)
    on_breach: str = option(
        "of `guard`: keep the iteration and stop, or end with the policy before it",
        "roll_back",
        choices=("stop", "roll_back"),
    )
    max_length_ratio: float = option("of `guard`: mean tokens of the last round, over the start's or under it", 2.0, above=1.0)
    min_distinct_ratio: float = option("of `guard`: distinct-2 of the last round, over the start's", 0.5, low=0.0, high=1.0)
    max_kl: float = option("of `guard`: KL to the start; 0: no limit", 0.0, unit="nats a response", low=0.0)


@dataclass(frozen=True)
class Trackers:
    """Where a run's figures also go."""

    use: list = option("`tensorboard`, `mlflow`, `wandb`, several or none ([])", ["tensorboard"], runtime=True)
    project: str = option("name of the project there", "evolve-ray", runtime=True)


@dataclass(frozen=True)
class RayOptions:
    """The local Ray that is started where no cluster is named by RAY_ADDRESS."""

    num_cpus: int = option("logical CPUs; 0: those of the machine", 0, low=0, runtime=True)
    object_store_mib: int = option("memory of the object store", 512, unit="MiB", low=80, runtime=True)
    dashboard: bool = option("start the Ray dashboard", True, runtime=True)
