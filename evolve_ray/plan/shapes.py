"""The shape of a model from its config.json alone: parameters, layers, caches. Nothing is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError

HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Shape:
    """A dense decoder with gated feed-forward layers, as Llama, Qwen, Mistral and Gemma are; sizes in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    query_bias: bool
    classifier: bool  # one output in place of a vocabulary

    @property
    def attention(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_size

    @property
    def cache(self) -> int:
        """Width of all key heads, which is that of all value heads."""
        return self.kv_heads * self.head_size

    @property
    def parameters(self) -> int:
        projections = 2 * self.hidden * (self.attention + self.cache) + 3 * self.hidden * self.intermediate
        biases = (self.attention + 2 * self.cache) if self.query_bias else 0
        head = self.hidden if self.classifier else 0 if self.tied else self.vocabulary * self.hidden
        return self.vocabulary * self.hidden + head + self.layers * (projections + biases + 2 * self.hidden) + self.hidden

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters of all linear layers but the head."""
        sides = 4 * self.hidden + 2 * self.attention + 2 * self.cache + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * sides

    @property
    def largest(self) -> int:
        """Parameters of the largest single module."""
        return max(self.vocabulary * self.hidden, self.intermediate * self.hidden)


def read_shape(path: str, field: str, *, classifier: bool = False) -> Shape | str:
    """The shape of a model folder or hub name, or in one sentence why it is not known."""
    config = read_config(path)
    if isinstance(config, str):
        return f"{field}: {config}"
    config = config.get("text_config") or config
    if any(key in config for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        return f"{field}: {path} is a mixture of experts, whose memory --plan does not know"
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Shape(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings")),
            query_bias=config.get("model_type") == "qwen2" or bool(config.get("attention_bias")),
            classifier=classifier,
        )
    except (KeyError, TypeError, ValueError) as error:
        return f"{field}: the config.json of {path} has no usable {error}, so its memory is not known"


def read_config(path: str) -> dict[str, Any] | str:
    """config.json of a folder or hub name; a sentence where it cannot be had."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        if path.startswith((".", "/", "~")):
            raise UserError(f"model: {path}: no such folder; give a Hugging Face folder or name")
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(path, "config.json", etag_timeout=HUB_TIMEOUT_S))
        except Exception as error:  # the hub client raises a dozen kinds, all about this name
            return (
                f"the hub does not give the config.json of {path} ({type(error).__name__}), so its memory is not known; "
                "give a folder that has it"
            )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{file} is not there or is not JSON, so the model's memory is not known"
    return found if isinstance(found, dict) else f"{file} is no JSON object, so the model's memory is not known"
