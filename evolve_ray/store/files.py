"""Files that are written whole or not at all, their hashes, and what a full disk says."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from evolve_ray.errors import ResourceError


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
    with report_disk_errors(path):
        with open(aside, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        fsync_path(path.parent)


@contextlib.contextmanager
def report_disk_errors(path: Path) -> Iterator[None]:
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
