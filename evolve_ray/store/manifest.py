"""Commits a folder, and reads and checks the manifest of a committed folder."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.errors import IntegrityError
from evolve_ray.store.files import fsync_path, report_disk_errors, sha256_file
from evolve_ray.store.rows import digest

MANIFEST = "MANIFEST.json"
CARD = "README.md"  # the model card; no manifest lists it, because it is written again when more is known


@dataclass(frozen=True)
class Manifest:
    """What a committed folder contains."""

    folder: Path
    stage: str
    key: str
    files: dict[str, dict]
    inputs: dict[str, str]
    stats: dict[str, Any]

    @property
    def identity(self) -> str:
        """A digest of the content: stage, key and file hashes, but no times or counts."""
        content = {name: file["sha256"] for name, file in self.files.items() if Path(name).name != MANIFEST}
        return digest([self.stage, self.key, content])

    def path(self, name: str) -> Path:
        """Returns the path of a listed file; IntegrityError if the manifest does not list it."""
        if name not in self.files:
            raise IntegrityError(
                f"{self.folder}: its manifest does not list {name}; delete the folder and submit the same command again to "
                "rebuild it"
            )
        return self.folder / name


def commit(work: Path, final: Path, *, stage: str, key: str, inputs: dict[str, str] | None = None, **stats: Any) -> Manifest:
    """Commits the folder `work` by renaming it to `final`.

    If another writer committed `final` in the meantime with the same key, that folder is kept and `work` is removed.
    IntegrityError if it was committed with another key, ResourceError if the disk refuses a write.
    """
    with report_disk_errors(final):
        files = {}
        for path in sorted(work.rglob("*")):
            if path.is_file() and path != work / MANIFEST:
                fsync_path(path)
            if path.is_file() and path not in (work / MANIFEST, work / CARD):
                files[path.relative_to(work).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        body = {"stage": stage, "key": key, "files": files, "inputs": inputs or {}, "stats": stats}
        with open(work / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(body, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        for folder in [work, *(path for path in work.rglob("*") if path.is_dir())]:
            fsync_path(folder)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(work, final)
        except OSError:
            existing = read_manifest(final)
            if existing is None:
                raise
            if existing.key != key:
                raise IntegrityError(
                    f"{final}: another writer committed it meanwhile from other inputs, and it was not changed; "
                    "submit the same command again"
                ) from None
            shutil.rmtree(work, ignore_errors=True)
            return existing
        fsync_path(final.parent)
    return Manifest(final, stage, key, files, inputs or {}, stats)


def read_manifest(folder: Path, *, verify: bool = False) -> Manifest | None:
    """Returns the manifest of a committed folder, or None if the folder is not committed; `verify` also checks every hash.

    IntegrityError if the manifest is damaged or, with `verify`, if a file does not match its hash.
    """
    try:
        manifest = parse_manifest(folder, json.loads((folder / MANIFEST).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError, IsADirectoryError):
        raise IntegrityError(
            f"{folder / MANIFEST}: is damaged; delete {folder} and submit the same command again to rebuild it"
        ) from None
    if verify:
        for message in file_faults(manifest):
            raise IntegrityError(f"{message}; delete {folder} and submit the same command again to rebuild it")
    return manifest


def parse_manifest(folder: Path, body: Any) -> Manifest:
    """Returns the manifest in `body`, the JSON that `commit` wrote; ValueError, KeyError or TypeError for anything else."""
    for name in ("files", "inputs", "stats"):
        if not isinstance(body[name], dict):
            raise TypeError(f"{name} is not a table")
    files, inputs = body["files"], body["inputs"]
    texts = [body["stage"], body["key"], *inputs.values(), *(file["sha256"] for file in files.values())]
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name]
    if outside or not all(isinstance(text, str) for text in texts):
        raise ValueError("not a manifest of this package")
    return Manifest(folder, body["stage"], body["key"], files, inputs, body["stats"])


def file_faults(manifest: Manifest) -> Iterator[str]:
    """Yields a message with both hashes for each file that is missing or does not match the manifest."""
    for name, expected in manifest.files.items():
        if name == CARD:  # older manifests list it
            continue
        path = manifest.folder / name
        actual = sha256_file(path) if path.is_file() else "missing"
        if actual != expected["sha256"]:
            yield f"{path}: sha256 is {actual}, but its manifest says {expected['sha256']}"
