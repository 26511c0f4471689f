"""The run directory: what is committed stays, and a stage that is committed for these inputs is never computed again.

Commit: files in a working folder on the same file system -> fsync -> MANIFEST.json (sizes, sha256, key) written and
synced last -> rename to the final name -> fsync of the parent. Renaming onto a folder that exists fails, which fences a
late writer. Reading goes through manifests only.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.errors import IntegrityError, LockedError, ResourceError, UserError
from evolve_ray.rows import digest, write_jsonl

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


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, a MiB at a time."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def sha256_file(path: Path) -> str:
    value = hashlib.sha256()
    for block in blocks(path):
        value.update(block)
    return value.hexdigest()


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replaces one file as a whole, by bytes or blocks of them; a reader sees the old or the new bytes."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with full_disk_named(path):
        with open(aside, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        fsync_path(path.parent)


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Whatever the disk refuses becomes one sentence with the path."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: BaseException) -> ResourceError:
    return ResourceError(
        f"{path}: cannot be written: {error}; {free_mib(path)} MiB are free there; free space or mend the disk, then submit again"
    )


def free_mib(path: Path) -> int:
    """Free space on the disk of a path that need not exist."""
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free >> 20


def commit(work: Path, final: Path, *, stage: str, key: str, inputs: dict[str, str] | None = None, **stats: Any) -> Manifest:
    """Makes the folder `work` the committed folder `final`; if `final` was committed meanwhile, keeps that one."""
    with full_disk_named(final):
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


class Stage:
    """One folder of the run: committed at `final`, or in the making at `work`, which belongs to this key alone."""

    def __init__(self, final: Path, name: str, key: str, inputs: dict[str, str] | None = None):
        self.final = final
        self.name = name
        self.key = key
        self.inputs = inputs or {}
        self.work = final.parent / f".{final.name}-{key[:12]}"

    def committed(self) -> Manifest | None:
        """The manifest if the stage is committed for this key. A folder of another key is an error, not a cache miss."""
        manifest = read_manifest(self.final, verify=True)
        if manifest is not None and manifest.key != self.key:
            raise UserError(
                f"{self.final}: was made from other inputs or options; use another --run, or submit with "
                "--rerun-changed to put it aside and compute it again"
            )
        return manifest

    def superseded(self) -> Manifest | None:
        """The committed manifest of another key, if there is one."""
        manifest = read_manifest(self.final)
        return manifest if manifest is not None and manifest.key != self.key else None

    def put_aside(self) -> Path:
        """Moves a committed folder of another key away, to a name that no stage uses."""
        old = self.superseded()
        assert old is not None
        aside = self.final.parent / f".superseded-{self.final.name}-{old.key[:12]}"
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(self.final, aside)
        return aside

    def start(self) -> Path:
        """The empty working folder."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        return self.work

    def resume(self) -> Path:
        """The working folder with what earlier attempts committed in it, and nothing half-written."""
        self.work.mkdir(parents=True, exist_ok=True)
        for path in self.work.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)
        return self.work

    def commit(self, rejected: Iterable[dict] = (), **stats: Any) -> Manifest:
        """Writes rejected.jsonl and commits; `num_rejected` among the counts says that the caller has written that file."""
        if "num_rejected" not in stats:
            with full_disk_named(self.work):
                stats["num_rejected"] = write_jsonl(self.work / "rejected.jsonl", rejected)
        return commit(self.work, self.final, stage=self.name, key=self.key, inputs=self.inputs, **stats)


class Run:
    """The run directory: configuration, lock, events, iterations."""

    def __init__(self, root: Path):
        self.root = root

    def iteration(self, number: int) -> Path:
        return self.root / f"iteration-{number:02d}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds RUN/LOCK; a second driver is told who holds it. The kernel frees it when the holder dies."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be made or written ({error.strerror}); choose another --run") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 4096).decode("utf-8", "replace").strip() or "an unnamed process"
            os.close(descriptor)
            raise LockedError(f"{self.root}: another driver works on this run: {holder}; wait for it or end it") from None
        try:
            own = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "job": submission_id(),
                "start": now(),
            }
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(own).encode())
            yield
        finally:
            os.close(descriptor)

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one line to events.jsonl in a single write."""
        line = json.dumps({"time": now(), "event": kind, **fields}, ensure_ascii=False, default=str) + "\n"
        path = self.root / "events.jsonl"
        with full_disk_named(path), open(path, "ab", buffering=0) as file:
            file.write(line.encode("utf-8", "replace"))

    @contextlib.contextmanager
    def timed(self, stage: str, iteration: int | None) -> Iterator[None]:
        """Events at the start and the end of a stage that has work to do."""
        start = time.monotonic()
        self.event("stage_start", stage=stage, iteration=iteration)
        yield
        self.event("stage_end", stage=stage, iteration=iteration, seconds=round(time.monotonic() - start, 3))


def submission_id() -> str | None:
    """The id of the Ray job that this driver is, from what Ray hands to a job's entry point; None outside of one."""
    try:
        return json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    except (KeyError, TypeError, ValueError):
        return None


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
