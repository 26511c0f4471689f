"""Copies a run between its local folder, the working copy, and an object store, which holds everything that is committed.

A committed folder is uploaded file by file. Its MANIFEST.json is uploaded last, and only if the store has none: in the store, as
on the disk, a folder without a manifest is not committed. When a driver starts, it downloads what the store has and the folder
lacks, and checks the sha256 of each file, so a run can be resumed on any machine. Only the driver talks to the store.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from evolve_ray.errors import IntegrityError
from evolve_ray.store.files import fsync_path, report_disk_errors, sha256_file, write_atomic
from evolve_ray.store.manifest import CARD, MANIFEST, Manifest, parse_manifest, read_manifest
from evolve_ray.store.object_lock import Lease
from evolve_ray.store.object_store import Store

ASIDE = ".superseded-"
FETCH = ".fetch-"  # a folder that is being downloaded


def is_working(place: str) -> bool:
    """Whether a path is in the working folder of a stage: shards and steps, which are removed when the stage is committed."""
    return any(part.startswith(".") and not part.startswith(ASIDE) for part in PurePosixPath(place).parts)


def committed_places(names: Iterable[str]) -> list[str]:
    """Returns the committed folders of a run, from the names of its files: stages, and the shards, steps and inner stages in the
    working folder of a stage that is not yet committed.

    A folder whose own name begins with a dot is not committed, even if it has a manifest: the manifest is written before the
    rename. A shard outside of a working folder is part of a stage that may not be completely uploaded or downloaded yet.
    """
    folders = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name == MANIFEST}
    # Prefixes of the working folders of committed stages: shards and steps that are left in them are not needed any more.
    finished = {str(place.parent / f".{place.name}-") for place in folders}

    def is_committed(place: PurePosixPath) -> bool:
        above = [parent for parent in place.parents if parent.name]
        working = [parent for parent in above if is_working(parent.name)]
        if is_working(place.name) or any(parent.name.startswith(FETCH) for parent in above):
            return False
        if any(re.sub(r"-[^-]*$", "-", str(parent)) in finished for parent in working):
            return False
        if not working:
            return len(above) == 1
        max_depth = 1 if place.name.startswith("shard-") else 2  # steps and inner stages may be in steps/ or parallel/
        return above.index(working[0]) < max_depth and not any(parent in folders for parent in above if parent not in working)

    return sorted(str(place) for place in folders if place.name and is_committed(place))


def loose_files(names: Iterable[str], places: list[str]) -> list[str]:
    """Returns the files that belong to no manifest: configuration, events, reports, trackers, cards; not the lock, which belongs
    to this machine.

    Any other file below the folder of a stage is left out: it may be part of a stage whose manifest is not written yet.
    """

    def is_loose(name: str) -> bool:
        top, *inner = PurePosixPath(name).parts
        if is_working(name) or top == "LOCK":
            return False
        card = len(inner) == 2 and inner[1] == CARD and f"{top}/{inner[0]}" in places
        return not top.startswith("iteration-") or len(inner) < 2 or card

    return [name for name in names if is_loose(name)]


def files_of(root: Path) -> list[str]:
    """Returns every file below a folder, relative to it; files that are removed during the search are left out."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    return sorted(Path(path).relative_to(root).as_posix() for path in paths)


class Mirror:
    """Copies the committed folders and loose files of a run between the folder `root` and the object store `store`.

    A `place` is the path of a committed folder, relative to `root` and to the URI of the store.
    """

    def __init__(self, store: Store, root: Path, lease: Lease):
        self.store, self.root, self.lease = store, root, lease
        self.stored_manifests: dict[str, bytes] = {}  # manifests in the store, by place
        self.partial: set[str] = set()  # places of which the store may have only a part
        self.stored_loose: dict[str, tuple[int, int]] = {}  # loose files in the store: size and mtime at their upload, or -1

    def parse(self, place: str, data: bytes) -> Manifest:
        """Returns the manifest in the bytes of an object; IntegrityError if it is damaged."""
        try:
            return parse_manifest(self.root / place, json.loads(data))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise IntegrityError(
                f"{self.store.uri}/{place}/{MANIFEST}: is damaged; delete that object and submit the same command again, which "
                f"uploads or computes {place} again"
            ) from None

    # From the store to the folder.

    def restore(self, *, alone: bool) -> None:
        """Downloads what the folder lacks, and removes unfinished uploads from the store.

        `alone`: no other driver has written to the store since this folder was last used, so the folder's loose files are newer.
        """
        names, places = self.fetch_all(alone=alone)
        inside = tuple(f"{place}/" for place in places)
        self.remove([name for name in names if is_working(name) and not name.startswith(inside)])

    def fetch_all(self, *, alone: bool) -> tuple[list[str], list[str]]:
        """Downloads what the folder lacks, without changing the store; returns its objects and its committed folders."""
        names = self.store.names()
        places = committed_places(names)
        for place in places:
            self.fetch(place)
        for name in loose_files(names, places):
            path = self.root / name
            self.stored_loose[name] = (-1, -1)
            if not (alone and path.exists()):
                self.fetch_loose(name, path)
        return names, places

    def fetch(self, place: str) -> None:
        """Downloads one committed folder completely; it replaces a local folder with the same key but different content."""
        data = self.store.read(f"{place}/{MANIFEST}")
        if data is None:
            return
        remote, final = self.parse(place, data), self.root / place
        local = read_manifest(final)
        if local and local.key != remote.key:
            if self.aside_of(remote).exists():  # this folder's driver put it aside; the next `sync` removes it from the store
                return
            raise IntegrityError(
                f"{final}: was made from other inputs or options than {self.store.uri}/{place}, which another driver committed; "
                f"delete {final} and submit the same command again to download the folder from the store"
            )
        self.stored_manifests[place] = data
        if local and local.identity == remote.identity:
            return
        temporary = final.with_name(f"{FETCH}{final.name}")
        with report_disk_errors(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, expected in remote.files.items():
                self.fetch_file(place, name, temporary / name, expected["sha256"])
            for folder in (path for path in temporary.rglob("*") if path.is_dir()):
                fsync_path(folder)
            write_atomic(temporary / MANIFEST, data)
            if local:
                shutil.rmtree(final)
            os.rename(temporary, final)
            fsync_path(final.parent)

    def fetch_file(self, place: str, name: str, path: Path, expected: str) -> None:
        """Downloads a file and checks its sha256; tries twice, because the transfer may be at fault and not the object."""
        for _ in range(2):
            try:
                self.store.download(f"{place}/{name}", path)
                actual = sha256_file(path)
            except FileNotFoundError:
                actual = "missing"
            if actual == expected:
                return fsync_path(path)
        where = f"{self.store.uri}/{place}"
        raise IntegrityError(
            f"{where}/{name}: sha256 is {actual}, but its manifest says {expected}; delete {where}/{MANIFEST} and submit the "
            "same command again, which uploads the folder from a working copy that has it, or computes it again"
        )

    def fetch_loose(self, name: str, path: Path) -> None:
        """Downloads a loose file, if the store still has it."""
        data = self.store.read(name)
        if data is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)

    # From the folder to the store.

    def sync(self, *, loose: bool = True) -> None:
        """Uploads the committed folders that the store lacks, and removes shards and steps that the folder no longer has.

        `loose`: does the same for loose files.
        """
        names = files_of(self.root)
        places = committed_places(names)
        for place in places:
            try:
                data = (self.root / place / MANIFEST).read_bytes()
                if self.stored_manifests.get(place) != data:
                    self.upload(place, data)
            except FileNotFoundError:  # the step was just replaced, or its stage just committed; the next call handles that
                pass
        for place in sorted((self.stored_manifests.keys() | self.partial) - set(places)):
            if is_working(place) or (
                place in self.stored_manifests and self.aside_of(self.parse(place, self.stored_manifests[place])).exists()
            ):
                self.withdraw(place)
        if loose:
            self.lease.check()
            present = loose_files(names, places)
            for name in present:
                with contextlib.suppress(FileNotFoundError):
                    self.upload_loose(name)
            deleted = sorted(self.stored_loose.keys() - set(present))  # a tracker rewrites its file under another name
            self.remove(deleted)
            for name in deleted:
                del self.stored_loose[name]

    def upload(self, place: str, data: bytes) -> None:
        """Uploads one committed folder, whose manifest has the bytes `data`, unless the store has it.

        IntegrityError if another writer committed different content there.
        """
        local, manifest = self.parse(place, data), f"{place}/{MANIFEST}"
        stored = self.store.read(manifest)
        if (
            stored is not None
            and self.parse(place, stored).key != local.key
            and self.aside_of(self.parse(place, stored)).exists()
        ):
            self.withdraw(place)
            stored = None
        if stored is None:
            self.partial.add(place)
            for name in local.files:
                self.lease.check(within_s=5.0)
                self.store.upload(f"{place}/{name}", self.root / place / name)
            self.lease.check()
            stored = self.store.put_if_absent(manifest, data)
        remote = self.parse(place, stored)
        if remote.identity != local.identity:
            what = "other inputs" if remote.key != local.key else "the same inputs with another result"
            raise IntegrityError(
                f"{self.store.uri}/{place}: another writer committed it meanwhile from {what}, and it was not changed; "
                "submit the same command again"
            )
        self.stored_manifests[place] = data

    def upload_loose(self, name: str) -> None:
        """Uploads a loose file if it has changed since its last upload."""
        path = self.root / name
        status = path.stat()
        if self.stored_loose.get(name) != (status.st_size, status.st_mtime_ns):
            data = path.read_bytes()
            if name == "events.jsonl":
                data = data[: data.rfind(b"\n") + 1]  # another process may be writing a line
            self.store.put(name, data)
            self.stored_loose[name] = (status.st_size, status.st_mtime_ns)

    def withdraw(self, place: str) -> None:
        """Removes a folder from the store, its manifest first, so that an interrupted removal leaves an uncommitted folder."""
        self.remove([f"{place}/{MANIFEST}"])
        self.remove(self.store.names(place))
        self.stored_manifests.pop(place, None)
        self.partial.discard(place)

    def remove(self, names: list[str]) -> None:
        """Removes objects from the store, if this driver still has the lock."""
        if names:
            self.lease.check()
            self.store.remove(names)

    def aside_of(self, manifest: Manifest) -> Path:
        """Returns the path to which `Stage.put_aside` moves a committed folder."""
        return manifest.folder.with_name(f"{ASIDE}{manifest.folder.name}-{manifest.key[:12]}")
