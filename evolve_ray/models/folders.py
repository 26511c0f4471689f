"""Model folders: finds the folder of a name, hashes its content, and reads its configuration."""

import json
from pathlib import Path

from evolve_ray.errors import UserError
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.rows import digest

WITHOUT_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt")
CONTENT = ("*.safetensors", *WITHOUT_WEIGHTS)


def resolve(path: str, field: str, files: tuple[str, ...] = CONTENT) -> Path:
    """The local folder of a model: a folder stays what it is, the `files` of a hub name are downloaded to the hub's cache.

    Raises UserError, which names `field`, if there is no such model.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or path.startswith((".", "/", "~")):
        raise UserError(f"{field}: {path}: is not a model folder; use a Hugging Face model folder or name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(files)))
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
