"""Reads the shape of a model from its config.json: parameters, layers, KV cache. No weights are loaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError

HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Shape:
    """A dense decoder with gated feed-forward layers, like Llama, Qwen, Mistral and Gemma; sizes in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    query_bias: bool
    classifier: bool  # one output instead of a vocabulary

    @property
    def attention(self) -> int:
        """Returns the width of all query heads."""
        return self.heads * self.head_size

    @property
    def cache(self) -> int:
        """Returns the width of all key heads; the value heads have the same."""
        return self.kv_heads * self.head_size

    @property
    def parameters(self) -> int:
        projections = 2 * self.hidden * (self.attention + self.cache) + 3 * self.hidden * self.intermediate
        biases = (self.attention + 2 * self.cache) if self.query_bias else 0
        head = self.hidden if self.classifier else 0 if self.tied else self.vocabulary * self.hidden
        return self.vocabulary * self.hidden + head + self.layers * (projections + biases + 2 * self.hidden) + self.hidden

    def adapters(self, rank: int) -> int:
        """Returns the parameters of LoRA adapters on all linear layers except the head."""
        widths = 4 * self.hidden + 2 * self.attention + 2 * self.cache + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * widths

    @property
    def largest(self) -> int:
        """Returns the parameters of the largest single module."""
        return max(self.vocabulary * self.hidden, self.intermediate * self.hidden)


def read_shape(path: str, field: str, *, classifier: bool = False) -> Shape | str:
    """Returns the shape of a model folder or hub name; if it is unknown, returns the reason as one sentence."""
    config = read_config(path)
    if isinstance(config, str):
        return f"{field}: {config}"
    config = config.get("text_config") or config
    if any(key in config for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        return f"{field}: {path} is a mixture of experts; --plan cannot estimate its memory"
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
        return f"{field}: the config.json of {path} has no usable {error}, so its memory is unknown"


def read_config(path: str) -> dict[str, Any] | str:
    """Returns config.json of a folder or hub name; if it cannot be read, returns the reason as one sentence."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        if path.startswith((".", "/", "~")):
            raise UserError(f"model: {path}: no such folder; give a Hugging Face folder or name")
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(path, "config.json", etag_timeout=HUB_TIMEOUT_S))
        except Exception as error:  # the hub client raises many kinds; here all concern this name
            return (
                f"the config.json of {path} cannot be downloaded from the hub ({type(error).__name__}), so its memory is "
                "unknown; give a folder that has it"
            )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{file} is missing or is not JSON, so the model's memory is unknown"
    return values if isinstance(values, dict) else f"{file} is not a JSON object, so the model's memory is unknown"
