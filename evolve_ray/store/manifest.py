"""A committed folder: how it is committed, and the manifest that says what it holds."""

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
CARD = "README.md"  # of a committed folder, in no manifest: prose for people, which is written again when more is known


@dataclass(frozen=True)
class Manifest:
    """What a committed folder holds. `identity` names its content: key and file hashes, no times."""

    folder: Path
    stage: str
    key: str
    files: dict[str, dict]
    inputs: dict[str, str]
    stats: dict[str, Any]

    @property
    def identity(self) -> str:
        content = {name: file["sha256"] for name, file in self.files.items() if Path(name).name != MANIFEST}
        return digest([self.stage, self.key, content])

    def path(self, name: str) -> Path:
        if name not in self.files:
            raise IntegrityError(f"{self.folder}: its manifest lists no {name}; delete the folder to rebuild it")
        return self.folder / name


def commit(work: Path, final: Path, *, stage: str, key: str, inputs: dict[str, str] | None = None, **stats: Any) -> Manifest:
    """Makes the folder `work` the committed folder `final`; if `final` was committed meanwhile, keeps that one."""
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
                    f"{final}: was committed meanwhile by another writer from other inputs and stays as it is; "
                    "submit the same command again"
                ) from None
            shutil.rmtree(work, ignore_errors=True)
            return existing
        fsync_path(final.parent)
    return Manifest(final, stage, key, files, inputs or {}, stats)


def read_manifest(folder: Path, *, verify: bool = False) -> Manifest | None:
    """The manifest of a committed folder, or None if nothing is committed there; `verify` also checks every hash."""
    try:
        manifest = parse_manifest(folder, json.loads((folder / MANIFEST).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError, IsADirectoryError):
        raise IntegrityError(f"{folder / MANIFEST}: is damaged; delete {folder} and submit again to rebuild it") from None
    if verify:
        for fault in file_faults(manifest):
            raise IntegrityError(f"{fault}; delete {folder} and submit the same command again to rebuild it")
    return manifest


def parse_manifest(folder: Path, body: Any) -> Manifest:
    """The manifest that `commit` wrote; ValueError, KeyError or TypeError for anything else."""
    for name in ("files", "inputs", "stats"):
        if not isinstance(body[name], dict):
            raise TypeError(f"{name} is no table")
    files, inputs = body["files"], body["inputs"]
    texts = [body["stage"], body["key"], *inputs.values(), *(file["sha256"] for file in files.values())]
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name]
    if outside or not all(isinstance(text, str) for text in texts):
        raise ValueError("no manifest of ours")
    return Manifest(folder, body["stage"], body["key"], files, inputs, body["stats"])


def file_faults(manifest: Manifest) -> Iterator[str]:
    """Each file of a committed folder that is not what the manifest says, with both hashes."""
    for name, expected in manifest.files.items():
        if name == CARD:  # older manifests hold it
            continue
        path = manifest.folder / name
        actual = sha256_file(path) if path.is_file() else "missing"
        if actual != expected["sha256"]:
            yield f"{path}: sha256 is {actual}, but its manifest says {expected['sha256']}"
