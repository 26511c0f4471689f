"""Model folders: where a name leads, what its content hash is, and whether it can do what the recipe asks of it."""

import json
from pathlib import Path

from evolve_ray.errors import UserError
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.rows import digest

CONTENT = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def resolve(path: str, field: str) -> Path:
    """The local folder of a model: a path as it is, a hub name through the hub's cache."""
    folder = Path(path)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or path.startswith((".", "/", "~")):
        raise UserError(f"{field}: {path}: is no model folder; give a Hugging Face folder or name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(CONTENT)))
    except Exception as error:  # the hub client raises a dozen kinds, all about this name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{field}: {path}: is neither a folder nor a model that the hub gives: {reason}") from None


def content_hash(folder: Path) -> str:
    """Hash of everything that decides what the model computes: weights, configuration, tokenizer, template."""
    manifest = read_manifest(folder)
    if manifest is not None:
        hashes = {name: file["sha256"] for name, file in manifest.files.items() if "/" not in name}
    else:
        hashes = {file.name: sha256_file(file) for pattern in CONTENT for file in folder.glob(pattern)}
    return digest({name: value for name, value in hashes.items() if any(Path(name).match(pattern) for pattern in CONTENT)})


def read_model_config(folder: Path, field: str) -> dict:
    """config.json of a folder that also has safetensors weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{field}: {folder}: has no config.json; give a Hugging Face model folder") from None
    except ValueError as error:
        raise UserError(f"{field}: {folder}/config.json: is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{field}: {folder}/config.json: is no JSON object; give a Hugging Face model folder")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{field}: {folder}: has no *.safetensors; save the model again with safe_serialization")
    if config.get("auto_map"):
        raise UserError(
            f"{field}: {folder}: needs its own Python code (auto_map in config.json), which is never run; use another model"
        )
    return config


def check_policy(folder: Path, context_tokens: int) -> None:
    """A causal language model whose positions reach as far as the recipe's context."""
    config = read_model_config(folder, "model.path")
    architectures = config.get("architectures") or []
    if not any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in architectures):
        raise UserError(f"model.path: {folder}: is no causal language model (architectures {architectures})")
    positions = config.get("max_position_embeddings")
    if positions and context_tokens > positions:
        raise UserError(f"model.context_tokens: is {context_tokens}, but {folder} has {positions} positions; lower it")


def check_reward_model(folder: Path, field: str = "scorer.model") -> None:
    """A sequence classifier with one output."""
    config = read_model_config(folder, field)
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UserError(
            f"{field}: {folder}: is no sequence classifier (architectures {architectures}); "
            "give a reward model saved as ...ForSequenceClassification"
        )
    labels = config.get("id2label")
    if labels is not None and len(labels) != 1:
        raise UserError(f"{field}: {folder}: has {len(labels)} outputs, but a reward model has one; give another model")


def check_vocabulary(folder: Path, field: str, ids: dict[str, int]) -> None:
    """Every token of the tokenizer has a row in the model's embedding; `ids` is the tokenizer's vocabulary."""
    config = read_model_config(folder, field)
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    beyond = sorted((number, token) for token, number in ids.items() if isinstance(size, int) and number >= size)
    if beyond:
        number, token = beyond[0]
        raise UserError(
            f"{field}: {folder}: its tokenizer does not fit the model: token {token!r} has id {number}, but config.json says "
            f"vocab_size {size}; use the model's own tokenizer"
        )
