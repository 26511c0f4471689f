"""The companion files of a checkpoint: all files of the source model that are not weights, copied as they are.

Copies keep what transformers would lose or change when it writes them anew: processor files, tokenizer settings, generation
settings, released dropout. Three things are updated, each only where the file does not say it already: the number type of the
weights, the end token of the chat template, and the names under which transformers 4 looks for what transformers 5 renamed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.models.folders import CONTENT
from evolve_ray.store.manifest import MANIFEST


def companions(folder: Path) -> list[Path]:
    """The files of a model folder that decide what the model computes, without the weights and their index."""
    files = {file for pattern in CONTENT for file in folder.glob(pattern)}
    return sorted(
        file
        for file in files
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json") and file.name != MANIFEST
    )


def copy(source: Path, out: Path, *, dtype: str, end_id: int, chat_template: str = "") -> None:
    """Copies the companion files; `end_id` is the token that the chat template writes after a response.

    A `chat_template` takes the place of the model's own, in every file that may hold it.
    """
    for file in companions(source):
        shutil.copyfile(file, out / file.name)
    update(out / "config.json", lambda config: readable_by_transformers_4(with_dtype(config, dtype)))
    update(out / "tokenizer_config.json", tokenizer_readable_by_transformers_4)
    if chat_template:
        (out / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        (out / "chat_template.json").unlink(missing_ok=True)
        update(out / "tokenizer_config.json", without_template)
    update(out / "generation_config.json", lambda settings: with_end(settings, end_id))


def update(path: Path, change: Callable[[dict], dict]) -> None:
    """Writes a JSON file again if `change` changes what is in it."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    after = change(before)
    if after != before:
        path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration, its parts too, that names the number type of the weights."""
    parts = {name: with_dtype(part, dtype) for name, part in config.items() if isinstance(part, dict) and has_dtype(part)}
    return config | parts | {name: dtype for name in ("dtype", "torch_dtype") if name in config}


def has_dtype(config: dict[str, Any]) -> bool:
    return "dtype" in config or "torch_dtype" in config


def with_end(settings: dict[str, Any], end_id: int) -> dict[str, Any]:
    """Generation settings whose end tokens include the chat template's; without it, others would generate to the length limit."""
    listed = settings.get("eos_token_id")
    ends = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return settings if end_id in ends else settings | {"eos_token_id": [*ends, end_id] if ends else end_id}


def readable_by_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that also has the names of transformers 4, which would take a `rope_theta` of 10000 without them."""
    older: dict[str, Any] = {name: readable_by_transformers_4(part) for name, part in config.items() if name.endswith("_config")
                             and isinstance(part, dict)}  # fmt: skip
    if "dtype" in config:
        older["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    by_layer = "full_attention" in rope
    whole = rope["full_attention"] if by_layer else rope
    if "rope_theta" in whole:
        older["rotary_emb_base" if config.get("model_type") == "gpt_neox" else "rope_theta"] = whole["rope_theta"]
    if "partial_rotary_factor" in whole:
        name = "rotary_pct" if config.get("model_type") == "gpt_neox" else "partial_rotary_factor"
        older[name] = whole["partial_rotary_factor"]
    if whole.get("rope_type", "default") != "default":
        older["rope_scaling"] = {
            name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")
        }
    if by_layer and "rope_theta" in rope.get("sliding_attention", {}):
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return config | {name: value for name, value in older.items() if name.endswith("_config") or name not in config}


def without_template(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "chat_template"}


def tokenizer_readable_by_transformers_4(settings: dict[str, Any]) -> dict[str, Any]:
    """Tokenizer settings under names that transformers 4 and 5 both know."""
    settings = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings
