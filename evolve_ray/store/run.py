"""The run directory: what is committed stays, and a stage that is committed for these inputs is never computed again.

Commit: files in a working folder on the same file system -> fsync -> MANIFEST.json (sizes, sha256, key) written and
synced last -> rename to the final name -> fsync of the parent. Renaming onto a folder that exists fails, which fences a
late writer. Reading goes through manifests only.
"""

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from evolve_ray.errors import LockedError, UserError
from evolve_ray.store.files import report_disk_errors
from evolve_ray.store.manifest import Manifest, commit, read_manifest
from evolve_ray.store.rows import write_jsonl


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
            with report_disk_errors(self.work):
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
        with report_disk_errors(path), open(path, "ab", buffering=0) as file:
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
