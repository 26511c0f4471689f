"""Options of what a run starts from: the tiny world, the model, the prompts, the template."""

from dataclasses import dataclass

from evolve_ray.config.option import option


@dataclass(frozen=True)
class Toy:
    """The tiny world: small models and data that the run makes itself; recipes name its parts `toy:base`, `toy:train`, ..."""

    seed: int = option("seed of its models and data", 0, low=0)
    hidden: int = option("hidden size of its models", 96, low=8)
    layers: int = option("layers of its models", 3, low=1)
    heads: int = option("attention heads of its models", 4, low=1)
    base_steps: int = option("training steps of the base model", 550, unit="steps", low=1)
    reward_model_steps: int = option("training steps of the reward model", 120, unit="steps", low=1)
    num_train: int = option("training prompts", 12000, unit="rows", low=1)
    num_heldout: int = option("held-out prompts of the same task", 500, unit="rows", low=1)
    num_out_of_domain: int = option("prompts of each of the splits `long` and `desc`", 250, unit="rows", low=1)
    num_triples: int = option("preference triples for the activation", 16000, unit="rows", low=1)


@dataclass(frozen=True)
class Model:
    """The policy to start from."""

    path: str = option("a Hugging Face folder or name (safetensors, a tokenizer with a chat template), or `toy:base`")
    dtype: str = option("number type of the weights in engines and training", "float32", choices=("float32", "bfloat16"))
    context_tokens: int = option("longest context, prompt and response together", 4096, unit="tokens", low=16)
    chat_template: str = option(
        "a .jinja file with a chat template, for a base model or in place of the model's own; checkpoints get it too",
        "",
        later=True,
    )
    template_arguments: dict = option(
        "arguments of the chat template, for example `{enable_thinking = false}`; used wherever it is rendered", {}, later=True
    )


@dataclass(frozen=True)
class Thinking:
    """Models that think before they answer: the answer alone is refined, scored and shown to the next round."""

    style: str = option(
        "`tags`: thinking ends with a mark; `channels`: the answer is the channel `final` (gpt-oss); `none`: a response is all "
        "answer; `auto`: what tokenizer and template know",
        "auto", choices=("auto", "none", "tags", "channels"),
    )  # fmt: skip
    open: str = option("the mark that begins the thinking", "<think>")
    close: str = option("the mark that ends the thinking", "</think>")
    train: str = option("`all`: thinking and answer are trained; `answer`: thinking is context", "all", choices=("all", "answer"))


@dataclass(frozen=True)
class Source:
    """A table of prompts."""

    path: str = option("a JSONL, JSON or Parquet file, or a `datasets` name (`owner/name` or `owner/name:config`) or folder")
    split: str = option("split of a `datasets` name or folder", "train")
    prompt_column: str = option(
        "column with the prompt, a text or a conversation; at its default other shapes are found too", "prompt"
    )
    answer_column: str = option("column with the gold answer; empty: there is none", "")
    answer_pattern: str = option(
        "regular expression: the first group of its last match in the answer column is the answer; empty: the whole column", ""
    )
    id_column: str = option("column with your own ids; empty: ids are content hashes", "")
    draft_column: str = option("column with a first draft, for a strategy that refines given drafts; empty: none", "", later=True)
    columns: list = option("further columns, which a strategy of your own sees in the prompt's row", [], later=True)


@dataclass(frozen=True)
class Prompts(Source):
    """Training prompts; each iteration takes fresh ones, as long as there are any."""

    per_iteration: int = option("fresh prompts for each iteration", 5000, unit="rows", low=1)
    again: str = option(
        "whether prompts come again: never (there must be enough for all iterations), or in a new order when all are used up",
        "never",
        choices=("never", "when_used_up"),
        later=True,
    )
    max_rejected_fraction: float = option(
        "largest share of prompts that may be too long; if more are, the run stops", 0.0, low=0.0, high=1.0
    )
    system: str = option(
        "system prompt for every row that has none, here, in [evaluation], [activation] and [offline]; empty: none",
        "",
        later=True,
    )


@dataclass(frozen=True)
class Template:
    """How prompts, drafts and the refinement instruction become chat messages."""

    name: str = option("a shipped template (`default`, `tiny`) or your own .toml file", "default")
    layout: str = option(
        "`conversation`: prompt, draft and instruction are turns; `one_message`: all in one user turn",
        "conversation",
        choices=("conversation", "one_message"),
    )
