"""How drafts are made, scored and selected: strategy, sampling, engines, scorer, verifier, selection."""

from dataclasses import dataclass

from evolve_ray.config.option import option


@dataclass(frozen=True)
class Strategy:
    """What a generation strategy asks of the model for one prompt.

    Rounds that a `stop_...` option leaves out are rows of kind `skipped`, which are neither scored nor selected.
    """

    name: str = option(
        "how drafts follow each other: each refines the one before, independent samples, several in view, after a critique, "
        "or the best of several goes on",
        "chain",
        choices=("chain", "parallel", "few_shot", "critique", "best_of"),
        plug=True,
    )
    rounds: int = option("drafts that follow each other", 4, unit="rounds", low=1)
    samples: int = option("independent samples of `parallel`, and of each round of `best_of`", 4, low=1)
    shots: int = option("earlier drafts that `few_shot` shows", 3, low=1)
    show: str = option("which earlier drafts `few_shot` shows", "last", choices=("last", "best"))
    stop_unchanged: bool = option("a `chain` of training data ends where a refinement equals its draft", False)
    stop_right: bool = option("a `chain` of training data ends where the verifier gives a draft its full mark (1.0)", False)


@dataclass(frozen=True)
class Sampling:
    """Sampling of every response."""

    temperature: float = option("0: greedy", 1.0, low=0.0)
    top_p: float = option("nucleus sampling", 1.0, above=0.0, high=1.0)
    max_tokens: int = option("longest response; a longer one is cut and counted", 1024, unit="tokens", low=1)


@dataclass(frozen=True)
class Engine:
    """The pool of inference engines."""

    name: str = option("which engine", "vllm", choices=("vllm",), plug=True)
    actors: int = option("engines", 1, low=1, runtime=True)
    cpus_per_actor: float = option("CPUs that Ray reserves for an engine", 1.0, low=0.0, runtime=True)
    gpus_per_actor: float = option("GPUs of an engine", 0.0, low=0.0, runtime=True)
    shard_prompts: int = option("prompts of a shard, which an engine commits as a whole", 256, unit="rows", low=1)
    max_num_seqs: int = option("requests that an engine works on at a time", 256, low=1)
    max_restarts: int = option("times that a shard may kill its engine before its rows are looked at", 3, low=0, runtime=True)
    stall_s: float = option(
        "an engine that finishes no response for so long is ended and started again", 1800.0, unit="s", above=0.0, runtime=True
    )
    max_rejected_fraction: float = option(
        "share of a stage's prompts that may be rejected before it stops", 0.1, low=0.0, high=1.0, runtime=True
    )
    release_for_training: bool = option(
        "engines and scorers end before a training starts, so that both take turns on the same GPUs; false: they stay and get "
        "new weights in place",
        True,
        runtime=True,
    )
    args: dict = option("arguments of vLLM's `LLM`, as they are", {})
    env: dict = option("environment variables of the engines' processes", {}, runtime=True)


@dataclass(frozen=True)
class Scorer:
    """What a response is worth."""

    name: str = option(
        "a reward model, the verifier, or the mean or minimum of several",
        "reward_model",
        choices=("reward_model", "verifier", "mean", "minimum"),
        plug=True,
    )
    model: str = option("the reward model: a folder or name of a sequence classifier, or `toy:reward_model`", "")
    members: list = option(
        'what a mean or minimum is of: "verifier", "module:Name" or "reward_model=FOLDER_OR_NAME", all in one actor', []
    )
    dtype: str = option("number type of reward models", "float32", choices=("float32", "bfloat16"))
    max_tokens: int = option("longest prompt and response that a reward model reads", 4096, unit="tokens", low=16)
    batch_size: int = option("responses that a reward model reads at a time", 32, unit="rows", low=1)
    actors: int = option("scoring actors", 1, low=1, runtime=True)
    cpus_per_actor: float = option("CPUs that Ray reserves for a scoring actor", 1.0, low=0.0, runtime=True)
    gpus_per_actor: float = option("GPUs of a scoring actor", 0.0, low=0.0, runtime=True)
    max_restarts: int = option("times that a shard may kill its actor before its rows are looked at", 3, low=0, runtime=True)
    stall_s: float = option(
        "an actor that makes no progress for so long is ended and started again", 1800.0, unit="s", above=0.0, runtime=True
    )
    max_rejected_fraction: float = option(
        "share of the drafts that may get no finite score before the stage stops", 0.1, low=0.0, high=1.0, runtime=True
    )


@dataclass(frozen=True)
class Verifier:
    """The checkable answer, if there is one: 1.0 means exactly right."""

    name: str = option(
        "how an answer is checked: equal text, a pattern, the last number, or equal mathematics",
        "exact",
        choices=("exact", "regex", "numeric", "math"),
        plug=True,
    )
    pattern: str = option(
        "of `regex`: its last match in a response, first group where it has one, is compared with the answer", ""
    )
    tolerance: float = option("of `numeric`: allowed relative difference", 1e-9, low=0.0)


@dataclass(frozen=True)
class Selection:
    """How one prompt's scored drafts become preference pairs. The last three options are the guards of `rule`."""

    name: str = option(
        "better over worse by score, last round over first by rule, or at random",
        "reward_model",
        choices=("reward_model", "rule", "random"),
        plug=True,
    )
    pairing: str = option(
        "of `reward_model`: best over worst draft, or the better over the worse of neighbouring rounds",
        "extremes",
        choices=("extremes", "neighbours"),
    )
    margin: float = option("of `reward_model`: scores of a pair are more than this apart", 0.0, unit="of the scorer", low=0.0)
    max_pairs: int = option("pairs of one prompt at most", 1, unit="rows", low=1)
    allow_cut: bool = option("a draft that was cut by length may be chosen", False)
    max_similarity: float = option("edit similarity from which last and first round are no pair", 0.98, above=0.0, high=1.0)
    max_length_ratio: float = option("ratio of lengths beyond which last and first round are no pair", 2.0, low=1.0)
    max_repetition: float = option("share of repeated 4-grams beyond which the last round is not chosen", 0.3, low=0.0, high=1.0)
