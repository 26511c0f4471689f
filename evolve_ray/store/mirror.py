"""A run in an object store: the run works in a folder, its working copy, and the store holds all that is committed there.

A committed folder is uploaded file by file, its MANIFEST.json last and only if there is none; a folder without one is not
committed, in the store as on the disk. What the store has and the folder lacks is fetched when a driver starts, each file held
against its sha256, so that a driver goes on wherever it is started. Only the driver speaks to the store.
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
FETCH = ".fetch-"  # what is on its way from the store


def is_working(place: str) -> bool:
    """In the working folder of a stage: shards and steps, which go when the stage is committed."""
    return any(part.startswith(".") and not part.startswith(ASIDE) for part in PurePosixPath(place).parts)


def committed_places(names: Iterable[str]) -> list[str]:
    """The committed folders of a run among its files: stages, and shards, steps and stages in the working folder of a stage
    that is not committed itself.

    A folder whose own name begins with a dot is in the making, whatever is in it: its manifest is written before its rename.
    A shard outside of a working folder is a part of a stage, of which more may still be under way.
    """
    found = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name == MANIFEST}
    ended = {str(place.parent / f".{place.name}-") for place in found}

    def counts(place: PurePosixPath) -> bool:
        above = [parent for parent in place.parents if parent.name]
        working = [parent for parent in above if is_working(parent.name)]
        if is_working(place.name) or any(parent.name.startswith(FETCH) for parent in above):
            return False
        if any(re.sub(r"-[^-]*$", "-", str(parent)) in ended for parent in working):
            return False
        if not working:
            return len(above) == 1
        nearest = 1 if place.name.startswith("shard-") else 2  # between: steps/, parallel/
        return above.index(working[0]) < nearest and not any(parent in found for parent in above if parent not in working)

    return sorted(str(place) for place in found if place.name and counts(place))


def loose_files(names: Iterable[str], places: list[str]) -> list[str]:
    """The files that no manifest is for: configuration, events, reports, trackers, cards; not the lock, which is the machine's.

    Never what else stands below the name of a stage: it may be a part of one whose manifest is still to come.
    """

    def counts(name: str) -> bool:
        top, *inner = PurePosixPath(name).parts
        if is_working(name) or top == "LOCK":
            return False
        card = len(inner) == 2 and inner[1] == CARD and f"{top}/{inner[0]}" in places
        return not top.startswith("iteration-") or len(inner) < 2 or card

    return [name for name in names if counts(name)]


def files_of(root: Path) -> list[str]:
    """Every file below a folder; what others remove meanwhile is left out."""
    found = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    return sorted(Path(path).relative_to(root).as_posix() for path in found)


class Mirror:
    """Both sides of a run: `root` and `store`."""

    def __init__(self, store: Store, root: Path, lease: Lease):
        self.store, self.root, self.lease = store, root, lease
        self.held: dict[str, bytes] = {}  # manifests that the store holds, by place
        self.begun: set[str] = set()  # places of which the store may hold a part
        self.sent: dict[str, tuple[int, int]] = {}  # the loose files that it holds, with the size and time of those sent

    def parse(self, place: str, data: bytes) -> Manifest:
        try:
            return parse_manifest(self.root / place, json.loads(data))
        except (ValueError, KeyError, TypeError, RecursionError):
            where = f"{self.store.uri}/{place}"
            raise IntegrityError(
                f"{where}/{MANIFEST}: is damaged; delete that object and submit again: {place} is uploaded or computed again"
            ) from None

    # From the store to the folder.

    def restore(self, *, alone: bool) -> None:
        """Fetches what the folder lacks. `alone`: no other driver has written since this folder was in use, so its loose
        files are the younger ones."""
        names, places = self.fetch_all(alone=alone)
        inside = tuple(f"{place}/" for place in places)
        self.remove([name for name in names if is_working(name) and not name.startswith(inside)])  # uploads that were cut off

    def fetch_all(self, *, alone: bool) -> tuple[list[str], list[str]]:
        """Changes the folder only; gives back all objects, and the committed folders among them."""
        names = self.store.names()
        places = committed_places(names)
        for place in places:
            self.fetch(place)
        for name in loose_files(names, places):
            path = self.root / name
            self.sent[name] = (-1, -1)
            if not (alone and path.exists()):
                self.fetch_loose(name, path)
        return names, places

    def fetch(self, place: str) -> None:
        """One committed folder, as a whole; a folder of the same key and other content gives way to the store's."""
        data = self.store.read(f"{place}/{MANIFEST}")
        if data is None:
            return
        theirs, final = self.parse(place, data), self.root / place
        mine = read_manifest(final)
        if mine and mine.key != theirs.key:
            if self.aside_of(theirs).exists():  # put aside here; the store is told by the next `sync`
                return
            raise IntegrityError(
                f"{final}: was made from other inputs or options than {self.store.uri}/{place}, which another driver committed; "
                f"delete {final} to fetch the store's and submit again"
            )
        self.held[place] = data
        if mine and mine.identity == theirs.identity:
            return
        aside = final.with_name(f"{FETCH}{final.name}")
        with report_disk_errors(aside):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            for name, expected in theirs.files.items():
                self.fetch_file(place, name, aside / name, expected["sha256"])
            for folder in (path for path in aside.rglob("*") if path.is_dir()):
                fsync_path(folder)
            write_atomic(aside / MANIFEST, data)
            if mine:
                shutil.rmtree(final)
            os.rename(aside, final)
            fsync_path(final.parent)

    def fetch_file(self, place: str, name: str, path: Path, expected: str) -> None:
        """A file whose hash is known; what came over damaged comes once more before the object is to blame."""
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
            "same command again: the folder is uploaded from a working copy that has it, or computed again"
        )

    def fetch_loose(self, name: str, path: Path) -> None:
        data = self.store.read(name)
        if data is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)

    # From the folder to the store.

    def sync(self, *, loose: bool = True) -> None:
        """Uploads every committed folder that the store lacks, then removes shards and steps that are gone from the folder."""
        names = files_of(self.root)
        places = committed_places(names)
        for place in places:
            try:
                data = (self.root / place / MANIFEST).read_bytes()
                if self.held.get(place) != data:
                    self.upload(place, data)
            except FileNotFoundError:  # a step that was just replaced, shards that just became a stage: the next call sees it
                pass
        for place in sorted((self.held.keys() | self.begun) - set(places)):
            if is_working(place) or (place in self.held and self.aside_of(self.parse(place, self.held[place])).exists()):
                self.withdraw(place)
        if loose:
            self.lease.check()
            kept = loose_files(names, places)
            for name in kept:
                with contextlib.suppress(FileNotFoundError):
                    self.upload_loose(name)
            gone = sorted(self.sent.keys() - set(kept))  # a tracker writes its file anew under another name
            self.remove(gone)
            for name in gone:
                del self.sent[name]

    def upload(self, place: str, data: bytes) -> None:
        mine, manifest = self.parse(place, data), f"{place}/{MANIFEST}"
        held = self.store.read(manifest)
        if held is not None and self.parse(place, held).key != mine.key and self.aside_of(self.parse(place, held)).exists():
            self.withdraw(place)
            held = None
        if held is None:
            self.begun.add(place)
            for name in mine.files:
                self.lease.check(within_s=5.0)
                self.store.upload(f"{place}/{name}", self.root / place / name)
            self.lease.check()
            held = self.store.put_new(manifest, data)
        theirs = self.parse(place, held)
        if theirs.identity != mine.identity:
            what = "other inputs" if theirs.key != mine.key else "the same inputs with another outcome"
            raise IntegrityError(
                f"{self.store.uri}/{place}: was committed meanwhile by another writer from {what} and stays as it is; "
                "submit the same command again"
            )
        self.held[place] = data

    def upload_loose(self, name: str) -> None:
        path = self.root / name
        told = path.stat()
        if self.sent.get(name) != (told.st_size, told.st_mtime_ns):
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1] if name == "events.jsonl" else data  # another process may be writing a line
            self.store.put(name, whole)
            self.sent[name] = (told.st_size, told.st_mtime_ns)

    def withdraw(self, place: str) -> None:
        """Removes a folder from the store, its manifest first: from then on it is not committed."""
        self.remove([f"{place}/{MANIFEST}"])
        self.remove(self.store.names(place))
        self.held.pop(place, None)
        self.begun.discard(place)

    def remove(self, names: list[str]) -> None:
        if names:
            self.lease.check()
            self.store.remove(names)

    def aside_of(self, manifest: Manifest) -> Path:
        """Where `Stage.put_aside` moves a committed folder."""
        return manifest.folder.with_name(f"{ASIDE}{manifest.folder.name}-{manifest.key[:12]}")
