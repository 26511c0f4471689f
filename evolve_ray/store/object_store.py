"""Reads and writes objects under one URI of an object store.

Every call is retried with growing pauses while the store fails, and raises one clear error if the store keeps failing.
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

# The client retries a request, or a part of a large file, only once. All other retries are made here, so that they end before
# the lock becomes stale.
CLIENTS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 1}}},
    "gs": {},
}
ACCESS_ERRORS = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "InvalidRegionError"}
PATIENCE_S = 120.0  # how long a store may fail before we give up; well below object_lock.STALE_S
Value = TypeVar("Value")


class Store:
    """Whole objects by their names below one URI. The client finds credentials itself: environment, files, instance."""

    def __init__(self, uri: str, patience_s: float = PATIENCE_S):
        self.uri, self.patience_s = uri, patience_s
        scheme, _, self.root = uri.partition("://")
        package, install = PACKAGES[scheme]
        try:
            __import__(package)
            import fsspec
        except ImportError:
            raise UserError(f"{uri}: needs the package {package}; run: {install}") from None
        settings = {"use_listings_cache": False, "skip_instance_cache": True, **CLIENTS[scheme]}
        self.fs: Any = self.with_retries("", lambda: fsspec.filesystem(scheme, **settings))
        self.fs.retries = 2  # s3fs uses this for connections that break or time out

    def with_retries(self, name: str, call: Callable[[], Value]) -> Value:
        """Returns the result of `call`, which is retried while the store fails; a FileNotFoundError is raised at once.

        UserError if the store refuses access, ResourceError if it fails for longer than `patience_s`.
        """
        started, pause = time.monotonic(), 0.1
        while True:
            try:
                return call()
            except (EvolveError, FileNotFoundError):
                raise
            except Exception as error:  # the client, its HTTP library and its event loop have no common base class
                reason = re.sub(r"//[^/@\s]*@", "//", f"{type(error).__name__}: {first_line(error)}")
                where = f"{self.uri}/{name}".rstrip("/")
                if type(error).__name__ in ACCESS_ERRORS:
                    raise UserError(
                        f"{where}: the store refuses access: {reason}; give the client credentials that may list, read, write "
                        "and delete there, then submit the same command again"
                    ) from None
                if time.monotonic() - started + pause > self.patience_s:
                    raise ResourceError(
                        f"{where}: the store did not answer correctly for {self.patience_s:g} s: {reason}; committed work is "
                        "kept: check the store and the network, then submit the same command again"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, 15.0)

    def path(self, name: str) -> str:
        """Returns the path of an object for the client."""
        return f"{self.root}/{name}"

    def names(self, below: str = "") -> list[str]:
        """Returns the names of all objects, or of those below a folder."""
        try:
            paths = self.with_retries(below, lambda: self.fs.find(self.path(below).rstrip("/")))
        except FileNotFoundError:
            return []
        prefix = f"{self.root}/"
        return sorted(path.removeprefix(prefix) for path in paths if path.startswith(prefix) and not path.endswith("/"))

    def read(self, name: str) -> bytes | None:
        """Returns the bytes of an object, None if it does not exist."""
        try:
            return self.with_retries(name, lambda: self.fs.cat_file(self.path(name)))
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """Writes an object, also over an existing one."""
        try:
            self.with_retries(name, lambda: self.fs.pipe_file(self.path(name), data))
        except FileNotFoundError:
            raise UserError(f"{self.uri}: the bucket does not exist; create it or choose another --run") from None

    def put_if_absent(self, name: str, data: bytes) -> bytes:
        """Writes an object if it does not exist; returns its bytes, which are another writer's if that writer was first."""

        def call() -> bytes:
            existing = self.read(name)  # in a retry it may exist, and be ours, if only the store's answer was lost
            if existing is not None:
                return existing
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                self.fs.pipe_file(self.path(name), data)  # this store has no put-if-absent; only the lock protects us
            return data

        try:
            return self.with_retries(name, call)
        except FileNotFoundError:
            raise UserError(f"{self.uri}: the bucket does not exist; create it or choose another --run") from None

    def upload(self, name: str, path: Path) -> None:
        """Uploads a file as an object; FileNotFoundError if the file does not exist any more."""

        def call() -> None:
            try:
                self.fs.put_file(str(path), self.path(name))
            except FileNotFoundError as error:
                if path.exists():
                    raise OSError(f"the bucket or the upload does not exist: {error}") from None
                raise

        self.with_retries(name, call)

    def download(self, name: str, path: Path) -> None:
        """Downloads an object to a file; FileNotFoundError if the object does not exist."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.with_retries(name, lambda: self.fs.get_file(self.path(name), str(path)))

    def remove(self, names: list[str]) -> None:
        """Removes objects; skips those that do not exist."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.with_retries(name, functools.partial(self.fs.rm_file, self.path(name)))
