"""Model folders: finds the folder of a name, hashes its content, and checks that the recipe can use the model."""

import json
from pathlib import Path

from evolve_ray.errors import UserError
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.rows import digest

CONTENT = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def resolve(path: str, field: str) -> Path:
    """The local folder of a model: a folder stays what it is, a hub name is downloaded to the hub's cache.

    Raises UserError, which names `field`, if there is no such model.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or path.startswith((".", "/", "~")):
        raise UserError(f"{field}: {path}: is not a model folder; use a Hugging Face model folder or name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(CONTENT)))
    except Exception as error:  # the hub client raises many types, all of them about this name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{field}: {path}: is not a folder, and the hub cannot provide it: {reason}") from None


def content_hash(folder: Path) -> str:
    """Hash of all files that decide what the model computes: weights, configuration, tokenizer, chat template."""
    manifest = read_manifest(folder)
    if manifest is not None:
        hashes = {name: file["sha256"] for name, file in manifest.files.items() if "/" not in name}
    else:
        hashes = {file.name: sha256_file(file) for pattern in CONTENT for file in folder.glob(pattern)}
    return digest({name: value for name, value in hashes.items() if any(Path(name).match(pattern) for pattern in CONTENT)})


def read_model_config(folder: Path, field: str) -> dict:
    """The config.json of a model folder.

    Raises UserError if it is missing or invalid, if there are no safetensors weights, or if the model needs its own code.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{field}: {folder}: has no config.json; use a Hugging Face model folder") from None
    except ValueError as error:
        raise UserError(f"{field}: {folder}/config.json: is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{field}: {folder}/config.json: is not a JSON object; use a Hugging Face model folder")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{field}: {folder}: has no *.safetensors; save the model again with safe_serialization")
    if config.get("auto_map"):
        raise UserError(
            f"{field}: {folder}: needs its own Python code (auto_map in config.json), which is never run; use another model"
        )
    return config


def check_policy(folder: Path, context_tokens: int) -> None:
    """Raises UserError unless the folder holds a causal language model with at least `context_tokens` positions."""
    config = read_model_config(folder, "model.path")
    architectures = config.get("architectures") or []
    if not any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in architectures):
        raise UserError(f"model.path: {folder}: is not a causal language model (architectures {architectures})")
    positions = config.get("max_position_embeddings")
    if positions and context_tokens > positions:
        raise UserError(f"model.context_tokens: is {context_tokens}, but {folder} has {positions} positions; lower it")


def check_reward_model(folder: Path, field: str = "scorer.model") -> None:
    """Raises UserError unless the folder holds a sequence classifier with one output."""
    config = read_model_config(folder, field)
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UserError(
            f"{field}: {folder}: is not a sequence classifier (architectures {architectures}); "
            "use a reward model that was saved as ...ForSequenceClassification"
        )
    labels = config.get("id2label")
    if labels is not None and len(labels) != 1:
        raise UserError(f"{field}: {folder}: has {len(labels)} outputs, but a reward model must have one; use another model")


def check_vocabulary(folder: Path, field: str, ids: dict[str, int]) -> None:
    """Raises UserError unless every token has a row in the model's embedding; `ids` maps the tokenizer's tokens to ids."""
    config = read_model_config(folder, field)
    text_config = config.get("text_config")
    size = config.get("vocab_size", text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    too_large = sorted((token_id, token) for token, token_id in ids.items() if isinstance(size, int) and token_id >= size)
    if too_large:
        token_id, token = too_large[0]
        raise UserError(
            f"{field}: {folder}: its tokenizer does not fit the model: token {token!r} has id {token_id}, but config.json has "
            f"vocab_size {size}; use the model's own tokenizer"
        )
