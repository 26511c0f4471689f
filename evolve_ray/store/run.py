"""The run directory: committed folders are never changed, and a stage that is committed for its inputs is not computed again.

A commit takes these steps: write the files to a working folder on the same file system; fsync them; write and fsync
MANIFEST.json (sizes, sha256, key) last; rename the folder to its final name; fsync the parent folder. A rename onto an existing
folder fails, so a late writer cannot replace a committed folder. Committed files are read only through their manifest.
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
from typing import IO, Any

from evolve_ray.errors import LockedError, UserError
from evolve_ray.store.files import report_disk_errors
from evolve_ray.store.manifest import MANIFEST, Manifest, commit, read_manifest
from evolve_ray.store.rows import write_jsonl

INPUTS = frozenset(
    ("held_out", "prompts", "activation_pairs", "offline_pairs", "keep_drafts", "foreign_drafts")
)  # read from files
ASIDE = ".superseded-"


class Stage:
    """One stage of the run: its folder is `final` when it is committed, and `work` before that; each key has its own `work`."""

    def __init__(self, final: Path, name: str, key: str, inputs: dict[str, str] | None = None):
        self.final = final
        self.name = name
        self.key = key
        self.inputs = inputs or {}
        self.work = final.parent / f".{final.name}-{key[:12]}"

    def committed(self) -> Manifest | None:
        """Returns the manifest if the stage is committed with this key, None if it is not committed.

        UserError if it is committed with another key, IntegrityError if a file is damaged.
        """
        manifest = read_manifest(self.final, verify=True)
        if manifest is not None and manifest.key != self.key:
            raise UserError(
                f"{self.final}: was made from other inputs or options; use another --run, or submit with "
                "--rerun-changed to put it aside and compute it again"
            )
        return manifest

    def superseded(self) -> Manifest | None:
        """Returns the manifest if the stage is committed with another key, else None."""
        manifest = read_manifest(self.final)
        return manifest if manifest is not None and manifest.key != self.key else None

    def put_aside(self) -> Path:
        """Renames a folder that is committed with another key to a name that no stage uses; returns the new path."""
        old = self.superseded()
        assert old is not None
        aside = self.final.parent / f"{ASIDE}{self.final.name}-{old.key[:12]}"
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(self.final, aside)
        return aside

    def start(self) -> Path:
        """Creates and returns an empty working folder."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        return self.work

    def resume(self) -> Path:
        """Returns the working folder with the shards and steps that are committed in it; removes unfinished ones."""
        self.work.mkdir(parents=True, exist_ok=True)
        for path in self.work.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)
        return self.work

    def commit(self, rejected: Iterable[dict] = (), **stats: Any) -> Manifest:
        """Writes `rejected` to rejected.jsonl and commits the stage with the counts `stats`.

        A caller that passes `num_rejected` has written rejected.jsonl itself.
        """
        if "num_rejected" not in stats:
            with report_disk_errors(self.work):
                stats["num_rejected"] = write_jsonl(self.work / "rejected.jsonl", rejected)
        return commit(self.work, self.final, stage=self.name, key=self.key, inputs=self.inputs, **stats)


class Run:
    """The run directory: configuration, lock, events, iterations."""

    def __init__(self, root: Path):
        self.root = root

    def iteration(self, number: int) -> Path:
        """Returns the folder of an iteration."""
        return self.root / f"iteration-{number:02d}"

    @property
    def ray_train(self) -> Path:
        """Returns the folder of Ray Train's own files, which go with the driver."""
        return self.root / ".ray-train"

    def has_results(self) -> bool:
        """Whether anything beyond the inputs is committed, a shard of an unfinished stage too.

        Inputs cost nothing, so as long as there is no more, a corrected recipe or data file replaces them.
        """
        folders = (path.parent.relative_to(self.root).parts for path in self.root.rglob(MANIFEST))
        return any(INPUTS.isdisjoint(parts) and not any(part.startswith(ASIDE) for part in parts) for parts in folders)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock RUN/LOCK for the block; the kernel frees it when this process dies.

        LockedError if another driver holds it, with host and process of that driver; UserError if it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be created or written ({error.strerror}); choose another --run") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other_driver = os.read(descriptor, 4096).decode("utf-8", "replace").strip() or "an unknown process"
            os.close(descriptor)
            raise LockedError(f"{self.root}: another driver works on this run: {other_driver}; wait for it or stop it") from None
        try:
            holder = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "job": submission_id(),
                "start": now(),
            }
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(holder).encode())
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
        """Appends an event at the start and, if the block succeeds, at the end of a stage that has work to do."""
        start = time.monotonic()
        self.event("stage_start", stage=stage, iteration=iteration)
        yield
        self.event("stage_end", stage=stage, iteration=iteration, seconds=round(time.monotonic() - start, 3))


def new_events(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The events that were appended to an open events.jsonl since the last call; a line that is still being written waits."""
    while raw := file.readline():
        if not raw.endswith(b"\n"):
            file.seek(-len(raw), os.SEEK_CUR)
            return
        yield json.loads(raw)


def submission_id() -> str | None:
    """Returns the submission id of the Ray job that runs this driver, from the environment; None outside of a job."""
    try:
        return json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    except (KeyError, TypeError, ValueError):
        return None


def now() -> str:
    """Returns the current time, UTC, in ISO format with milliseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
