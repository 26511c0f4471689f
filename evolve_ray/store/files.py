"""Atomic writes of files, their hashes, and the errors of a full or broken disk."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from evolve_ray.errors import ResourceError


def blocks(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file, 1 MiB at a time."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a file in hex."""
    hasher = hashlib.sha256()
    for block in blocks(path):
        hasher.update(block)
    return hasher.hexdigest()


def fsync_path(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replaces a file with `data`, bytes or blocks of bytes; a reader sees either all the old bytes or all the new ones."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with report_disk_errors(path):
        with open(temporary, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_path(path.parent)


@contextlib.contextmanager
def report_disk_errors(path: Path) -> Iterator[None]:
    """Raises any OSError of its block as a ResourceError that names `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: BaseException) -> ResourceError:
    """Returns the error for a file or folder that the disk did not let us write."""
    return ResourceError(
        f"{path}: cannot be written: {error}; {free_mib(path)} MiB are free there; free space or repair the disk, then submit "
        "the same command again"
    )


def free_mib(path: Path) -> int:
    """Returns the free space in MiB on the disk of `path`, which need not exist."""
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free >> 20
