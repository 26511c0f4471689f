"""Options of how drafts are generated, scored and selected: strategy, sampling, engines, scorer, verifier, selection."""

from dataclasses import dataclass

from evolve_ray.config.option import option


@dataclass(frozen=True)
class Strategy:
    """How the model is asked for the drafts of one prompt.

    Rounds that a `stop_...` option skips are stored as rows of kind `skipped`, which are neither scored nor selected.
    """

    name: str = option(
        "`chain`: each draft refines the one before; `parallel`: independent samples; `chains`: independent chains; "
        "`few_shot`: a draft sees several earlier ones; `critique`: a draft follows a critique of the one before; "
        "`best_of`: a round refines the best of several samples; "
        "`feedback`: a draft follows the verifier's words on the one before, until it is right; `self_judge`: independent "
        "samples, each rated by the model itself",
        "chain",
        choices=("chain", "parallel", "chains", "few_shot", "critique", "best_of", "feedback", "self_judge"),
        plug=True,
    )
    rounds: int = option("rounds of drafts for each prompt", 4, unit="rounds", low=1)
    samples: int = option("for `parallel`, `chains`, `self_judge` and each round of `best_of`: independent samples", 4, low=1)
    critiques: int = option("for `critique`: critiques of the first draft, each with its own revision", 1, low=1, later=True)
    shots: int = option("for `few_shot`: earlier drafts that a draft sees", 3, low=1)
    show: str = option("for `few_shot`: which earlier drafts a draft sees", "last", choices=("last", "best"))
    stop_unchanged: bool = option("for `chain`, in training data: stop when a refinement is equal to its draft", False)
    stop_right: bool = option("for `chain`, in training data: stop when the verifier gives a draft the full score (1.0)", False)
    args: dict = option(
        "for `self_judge`: `votes`, `low`, `high`, `temperature`, `max_tokens`; for a strategy of your own: its options",
        {},
        later=True,
    )


@dataclass(frozen=True)
class Sampling:
    """Sampling of every response."""

    temperature: float = option("sampling temperature; 0: greedy", 1.0, low=0.0)
    top_p: float = option("top-p of nucleus sampling; 1: off", 1.0, above=0.0, high=1.0)
    max_tokens: int = option("longest response; a longer one is cut and counted", 1024, unit="tokens", low=1)
    logps: bool = option(
        "whether drafts keep the engine's log-probability of each token, for `mismatch` of `policy_gradient`", False, later=True
    )


@dataclass(frozen=True)
class Engine:
    """The pool of inference engines."""

    name: str = option("the inference engine", "vllm", choices=("vllm",), plug=True)
    actors: int = option("number of engines", 1, low=1, runtime=True)
    cpus_per_actor: float = option("CPUs that Ray reserves for each engine", 1.0, low=0.0, runtime=True)
    gpus_per_actor: float = option("GPUs of each engine", 0.0, low=0.0, runtime=True)
    shard_prompts: int = option("prompts per shard; an engine commits a shard as a whole", 256, unit="rows", low=1)
    max_num_seqs: int = option("requests that an engine processes at the same time", 256, low=1)
    max_restarts: int = option(
        "times that a shard may crash its engine; after that the shard is halved to find the rows that crash it",
        3,
        low=0,
        runtime=True,
    )
    stall_s: float = option(
        "deadline: an engine that finishes no response for this long is restarted", 1800.0, unit="s", above=0.0, runtime=True
    )
    max_rejected_fraction: float = option(
        "largest share of a stage's prompts that may be rejected; if more are, the stage stops",
        0.1,
        low=0.0,
        high=1.0,
        runtime=True,
    )
    release_for_training: bool = option(
        "true: engines and scorers stop before a training starts, so that both can use the same GPUs in turn; false: they keep "
        "running and load new weights in place",
        True,
        runtime=True,
    )
    args: dict = option("arguments for vLLM's `LLM`, passed on unchanged", {})
    env: dict = option("environment variables of the engine processes", {}, runtime=True)


@dataclass(frozen=True)
class Scorer:
    """How a response is scored."""

    name: str = option(
        "a reward model, the verifier, the mean or minimum of several, `judge`: a language model, `vote`: the share of a "
        "prompt's drafts with the same answer, or `strategy`: the scores that the strategy gives (in evaluations the verifier's)",
        "reward_model",
        choices=("reward_model", "verifier", "mean", "minimum", "judge", "vote", "strategy"),
        plug=True,
    )
    model: str = option("the reward model: a folder or name of a sequence classifier, or `toy:reward_model`", "")
    members: list = option(
        'for `mean` and `minimum`: a list of "verifier", "module:Name" or "reward_model=FOLDER_OR_NAME"; all run in one actor', []
    )
    output: int = option(
        "for a reward model with several outputs: the number of the one that is the score; -1: it must have one",
        -1,
        low=-1,
        later=True,
    )
    dtype: str = option("number type of reward models", "float32", choices=("float32", "bfloat16"))
    max_tokens: int = option("longest prompt and response together that a reward model reads", 4096, unit="tokens", low=16)
    batch_size: int = option("responses that a reward model scores in one batch", 32, unit="rows", low=1)
    actors: int = option("number of scoring actors", 1, low=1, runtime=True)
    cpus_per_actor: float = option("CPUs that Ray reserves for each scoring actor", 1.0, low=0.0, runtime=True)
    gpus_per_actor: float = option("GPUs of each scoring actor", 0.0, low=0.0, runtime=True)
    max_restarts: int = option(
        "times that a shard may crash its actor; after that the shard is halved to find the rows that crash it",
        3,
        low=0,
        runtime=True,
    )
    stall_s: float = option(
        "deadline: an actor that makes no progress for this long is restarted", 1800.0, unit="s", above=0.0, runtime=True
    )
    max_rejected_fraction: float = option(
        "largest share of drafts that may have no finite score; if more have none, the stage stops",
        0.1,
        low=0.0,
        high=1.0,
        runtime=True,
    )
    args: dict = option(
        "for `judge`: its options, listed in docs/recipes.md; for `vote`: `reward`; for a scorer of your own: its options, as "
        "`args` of its making",
        {},
        later=True,
    )


@dataclass(frozen=True)
class Verifier:
    """How a response is checked against the gold answer; 1.0 means exactly right."""

    name: str = option(
        "`exact`: the text is equal; `regex`: the match of a pattern is equal; `numeric`: the last number is equal; `math`: the "
        "mathematical value is equal; `tests`: the program in the response passes the tests in the gold answer",
        "exact",
        choices=("exact", "regex", "numeric", "math", "tests"),
        plug=True,
    )
    pattern: str = option(
        "for `regex`: its last match in a response (the first group, if it has one) is compared with the gold answer", ""
    )
    tolerance: float = option("for `numeric`: allowed relative difference", 1e-9, low=0.0)
    args: dict = option(
        "for `tests`: `seconds`, `memory_mib`, `output_mib`; for a verifier of your own: its options, as `args` of its making",
        {},
        later=True,
    )


@dataclass(frozen=True)
class Selection:
    """How one prompt's scored drafts become preference pairs. The last three options are the guards of `rule`."""

    name: str = option(
        "`reward_model`: the draft with the higher score is chosen; `rule`: the last round is chosen, the first rejected; "
        "`random`: two random drafts; `advantages`: every answer alone, with its advantage, for `policy_gradient`; "
        "`turn_advantages`: so with every response, critiques too, after what its own ask showed; `reflections`: critiques of "
        "wrong drafts, by the revisions that used them; `trajectories`: whole lines of turns, for `turns_dpo`; `accepted`: every "
        "draft alone that is good enough, for `sft`; `tiers`: the shortest of the best over the longest of the worst",
        "reward_model",
        choices=(
            "reward_model",
            "rule",
            "random",
            "advantages",
            "turn_advantages",
            "reflections",
            "trajectories",
            "accepted",
            "tiers",
        ),
        plug=True,
    )
    pairing: str = option(
        "for `reward_model`: pair the best with the worst draft (`extremes`), or the drafts of neighbouring rounds",
        "extremes",
        choices=("extremes", "neighbours"),
    )
    margin: float = option(
        "for `reward_model`: the scores of a pair differ by more than this", 0.0, unit="units of the scorer", low=0.0
    )
    max_pairs: int = option("largest number of pairs per prompt", 1, unit="rows", low=1)
    allow_cut: bool = option("whether a draft that was cut by length may be chosen", False)
    max_similarity: float = option(
        "for `rule`: no pair if the edit similarity of last and first round is at least this", 0.98, above=0.0, high=1.0
    )
    max_length_ratio: float = option(
        "for `rule`: no pair if one of last and first round is longer than the other by more than this factor", 2.0, low=1.0
    )
    max_repetition: float = option(
        "for `rule`: no pair if more than this share of the 4-grams of the last round is repeated", 0.3, low=0.0, high=1.0
    )
    top_share: float = option(
        "share of an iteration's rows that is kept: those whose scores differ most; 1: all", 1.0, above=0.0, high=1.0, later=True
    )
    whole: str = option("`module:Name`: a function of your own that keeps or weights rows of the whole iteration", "", later=True)
    whole_args: dict = option("options of that function; it gets them as `args`", {}, later=True)
    args: dict = option(
        "for `advantages`: `baseline`, `bonus`, `rewarded`, `keep_zero`; for `turn_advantages`: `baseline` and `bonus`; for "
        "`reflections`: `form` and `right`; for `trajectories`: `turns`; for `accepted`: `floor`, `keep`, `pattern`; for "
        "`tiers`: `rho`; for a selection of your own: its options, as `args`",
        {},
        later=True,
    )
