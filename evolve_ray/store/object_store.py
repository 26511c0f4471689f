"""Objects under one URI of an object store.

Every verb is repeated with growing pauses while the store is out of order, and ends with one sentence if it stays so.
"""

import contextlib
import errno
import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from evolve_ray.errors import EvolveError, ResourceError, UserError, first_line

PACKAGES = {"s3": ("s3fs", 'pip install -e ".[s3]"'), "gs": ("gcsfs", "pip install gcsfs")}

# The client repeats a request, or a part of a large file, once; the rest is done here, where it ends before the lock is stale.
CLIENTS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 1}}},
    "gs": {},
}
REFUSED = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "InvalidRegionError"}
PATIENCE_S = 120.0  # how long a store may be out of order: well below lease.STALE_S
Value = TypeVar("Value")


class Store:
    """Whole objects by their names below one URI. Credentials are the client's own affair: environment, files, instance."""

    def __init__(self, uri: str, patience_s: float = PATIENCE_S):
        self.uri, self.patience_s = uri, patience_s
        scheme, _, self.root = uri.partition("://")
        package, install = PACKAGES[scheme]
        try:
            __import__(package)
            import fsspec
        except ImportError:
            raise UserError(f"{uri}: needs the package {package}: {install}") from None
        given = {"use_listings_cache": False, "skip_instance_cache": True, **CLIENTS[scheme]}
        self.fs: Any = self.persistently("", lambda: fsspec.filesystem(scheme, **given))
        self.fs.retries = 2  # of s3fs: connections cut or silent

    def persistently(self, name: str, call: Callable[[], Value]) -> Value:
        """What `call` gives in the end; FileNotFoundError is an answer and passes."""
        started, pause = time.monotonic(), 0.1
        while True:
            try:
                return call()
            except (EvolveError, FileNotFoundError):
                raise
            except Exception as error:  # of the client, of its HTTP library, of its event loop: there is no common base
                said = re.sub(r"//[^/@\s]*@", "//", f"{type(error).__name__}: {first_line(error)}")
                where = f"{self.uri}/{name}".rstrip("/")
                if type(error).__name__ in REFUSED:
                    raise UserError(
                        f"{where}: the store refuses: {said}; give the client credentials that may list, read, write and delete "
                        "there, then submit again"
                    ) from None
                if time.monotonic() - started + pause > self.patience_s:
                    raise ResourceError(
                        f"{where}: the store did not answer as it should for {self.patience_s:g} s: {said}; what is committed "
                        "stays: see to the store or the network, then submit the same command again"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, 15.0)

    def at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self, below: str = "") -> list[str]:
        """All objects, or those below a folder."""
        try:
            found = self.persistently(below, lambda: self.fs.find(self.at(below).rstrip("/")))
        except FileNotFoundError:
            return []
        inside = f"{self.root}/"
        return sorted(path.removeprefix(inside) for path in found if path.startswith(inside) and not path.endswith("/"))

    def read(self, name: str) -> bytes | None:
        """The bytes of an object, None if there is none."""
        try:
            return self.persistently(name, lambda: self.fs.cat_file(self.at(name)))
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        try:
            self.persistently(name, lambda: self.fs.pipe_file(self.at(name), data))
        except FileNotFoundError:
            raise UserError(f"{self.uri}: there is no such bucket; make it or choose another --run") from None

    def put_new(self, name: str, data: bytes) -> bytes:
        """Writes an object that is not there yet; gives back what it holds then, which is another's if they came first."""

        def call() -> bytes:
            there = self.read(name)  # also after an answer that was lost: the object may be there, and may be ours
            if there is not None:
                return there
            try:
                self.fs.pipe_file(self.at(name), data, mode="create")
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                self.fs.pipe_file(self.at(name), data)  # a store without put-if-absent: the lock is all there is
            return data

        try:
            return self.persistently(name, call)
        except FileNotFoundError:
            raise UserError(f"{self.uri}: there is no such bucket; make it or choose another --run") from None

    def upload(self, name: str, path: Path) -> None:
        """A file as an object; FileNotFoundError if the file is gone."""

        def call() -> None:
            try:
                self.fs.put_file(str(path), self.at(name))
            except FileNotFoundError as error:
                if path.exists():
                    raise OSError(f"no such bucket or upload: {error}") from None
                raise

        self.persistently(name, call)

    def download(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.persistently(name, lambda: self.fs.get_file(self.at(name), str(path)))

    def remove(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.persistently(name, functools.partial(self.fs.rm_file, self.at(name)))
