"""Every option of a run: strict, frozen, in one place.

A recipe is a TOML file with the sections below. An unknown key, a wrong type or a value out of range is refused with the
file, the line and the nearest name, before anything heavy is imported. Fields marked `runtime` change where and how fast
a run computes, never what: they are no part of a stage's key and may differ when a run is resumed.
"""

import dataclasses
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError
from evolve_ray.strict import Reader, describe, join, option, parse_value, place


@dataclass(frozen=True)
class Toy:
    """The tiny world: models and data made on the spot; recipes name its parts as `toy:base`, `toy:train`, ..."""

    seed: int = option(0, low=0)
    hidden: int = option(96, low=8)
    layers: int = option(3, low=1)
    heads: int = option(4, low=1)
    base_steps: int = option(400, low=1)
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
    """A table of prompts: a JSONL or Parquet file, or a `datasets` name or folder; columns named as in the file."""

    path: str = option()
    split: str = option("train")
    prompt_column: str = option("prompt")
    answer_column: str = option("")
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
    """What a generation strategy asks of the model for one prompt."""

    name: str = option("chain", choices=("chain", "parallel"), plug=True)
    rounds: int = option(4, low=1)
    samples: int = option(4, low=1)


@dataclass(frozen=True)
class Sampling:
    """Sampling of every response."""

    temperature: float = option(1.0, low=0.0)
    top_p: float = option(1.0, above=0.0, high=1.0)
    max_tokens: int = option(1024, low=1)


@dataclass(frozen=True)
class Engine:
    """The pool of inference engines. `args` go to vLLM as they are; `env` is set before its processes start.

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
    release_for_training: bool = option(True, runtime=True)
    args: dict = option({})
    env: dict = option({}, runtime=True)


@dataclass(frozen=True)
class Scorer:
    """What a response is worth: a reward model, the verifier, or `module:Name`."""

    name: str = option("reward_model", choices=("reward_model", "verifier"), plug=True)
    model: str = option("")
    dtype: str = option("float32", choices=("float32", "bfloat16"))
    max_tokens: int = option(4096, low=16)
    batch_size: int = option(32, low=1)
    actors: int = option(1, low=1, runtime=True)
    cpus_per_actor: float = option(1.0, low=0.0, runtime=True)
    gpus_per_actor: float = option(0.0, low=0.0, runtime=True)
    max_restarts: int = option(3, low=0, runtime=True)


@dataclass(frozen=True)
class Verifier:
    """The checkable answer, if there is one: 1.0 means exactly right."""

    name: str = option("exact", choices=("exact",), plug=True)


@dataclass(frozen=True)
class Selection:
    """How one prompt's scored drafts become preference pairs."""

    name: str = option("reward_model", choices=("reward_model",), plug=True)
    margin: float = option(0.0, low=0.0)


@dataclass(frozen=True)
class Training:
    """One phase of training: objective and optimiser. `batch_pairs` is global; `micro_pairs` is per worker."""

    objective: str = option("evolve", choices=("sft", "dpo", "evolve"), plug=True)
    alpha: float = option(0.5, low=0.0, high=1.0)
    beta: float = option(0.1, above=0.0)
    nll: float = option(0.0, low=0.0)
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
    """The Ray Train worker group. `deepspeed` is merged into the DeepSpeed configuration."""

    workers: int = option(1, low=1)
    use_gpu: bool = option(False)
    cpus_per_worker: float = option(1.0, low=0.0, runtime=True)
    checkpoint_steps: int = option(50, low=1, runtime=True)
    max_failures: int = option(3, low=0, runtime=True)
    gradient_checkpointing: bool = option(False)
    deepspeed: dict = option({})
    env: dict = option({}, runtime=True)


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts by split name (`[evaluation.splits]`), refined in a chain and reported by round."""

    splits: dict = option({})
    prompt_column: str = option("prompt")
    answer_column: str = option("")
    split: str = option("train")
    rounds: int = option(4, low=1)
    temperature: float = option(1.0, low=0.0)
    limit: int = option(0, low=0)


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
    selection: Selection = field(default_factory=Selection)
    training: Training = field(default_factory=Training)
    trainer: Trainer = field(default_factory=Trainer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    ray: RayOptions = field(default_factory=RayOptions)


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a recipe and applies `key=value` overrides (dotted keys; values in TOML syntax, bare words as strings)."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; the shipped ones are in jobs/recipes/") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, but must be a recipe (a TOML file)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is not valid TOML: {error}") from None
    overridden = set()
    for item in overrides:
        key, equals, raw = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"command line: {item!r}: must have the form key=value, for example training.beta=0.2")
        overridden.add(key.strip())
        if key.strip() in OPTIONAL and raw.strip() == "none":
            tree.pop(key.strip(), None)
        else:
            place(tree, key.strip().split("."), parse_value(raw.strip()))
    config = Reader(str(path), text, overridden).build(Config, tree)
    check_together(config, Reader(str(path), text, overridden))
    return config


OPTIONAL = ("toy", "activation", "offline", "verifier")  # tables that `TABLE=none` on the command line takes away


def check_together(config: Config, reader: Reader) -> None:
    """What no single field can say."""
    if config.scorer.name == "reward_model" and not config.scorer.model:
        reader.fail("scorer.model", "must name a reward model when scorer.name is 'reward_model'")
    if config.scorer.name == "verifier" and config.verifier is None:
        reader.fail("verifier", "must be set when scorer.name is 'verifier'; add a [verifier] table")
    if config.verifier is not None and not config.prompts.answer_column:
        reader.fail("prompts.answer_column", "must name the column with the answers that [verifier] checks")
    if config.verifier is not None and config.evaluation.splits and not config.evaluation.answer_column:
        reader.fail("evaluation.answer_column", "must name the column with the answers that [verifier] checks")
    for name, path in config.evaluation.splits.items():
        if not isinstance(path, str):
            reader.fail(f"evaluation.splits.{name}", f"is {describe(path)}, but must be a string: a file or dataset")
        if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
            reader.fail(f"evaluation.splits.{name}", "a split's name may hold letters, digits, - and _ only")
    if 2 * config.sampling.max_tokens >= config.model.context_tokens:
        reader.fail(
            "sampling.max_tokens",
            f"is {config.sampling.max_tokens}; a draft and its refinement need twice that, "
            f"which must be below model.context_tokens ({config.model.context_tokens})",
        )
    if config.toy is None:
        named = [config.model.path, config.prompts.path, config.scorer.model, *config.evaluation.splits.values()]
        named += [part.path for part in (config.activation, config.offline) if part]
        for path in named:
            if path.startswith("toy:"):
                reader.fail("toy", f"{path!r} is part of the tiny world; add a [toy] table to the recipe")


def resolved(part: Any, *, runtime: bool = True) -> Any:
    """A section as plain JSON values; without its `runtime` fields when it goes into a stage's key."""
    if not dataclasses.is_dataclass(part):
        return part
    return {
        f.name: resolved(getattr(part, f.name), runtime=runtime)
        for f in dataclasses.fields(part)
        if runtime or not f.metadata.get("runtime")
    }


def from_json(tree: dict, where: str) -> Config:
    """The configuration that `resolved` wrote; absent tables are null there."""
    given = {name: value for name, value in tree.items() if value is not None}
    return Reader(where, "", set()).build(Config, given)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; used to name the fields in which two configurations differ."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, join(prefix, key))
        else:
            flat[join(prefix, key)] = value
    return flat
