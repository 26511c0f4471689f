"""The operators that DeepSpeed compiles at first use: a build folder that killed processes cannot block, and clear errors.

torch protects a build with a file named `lock`. A process that is killed during a build leaves this file behind, and all later
processes wait for it for ever. So every rank holds a kernel lock (flock), which ends with its process. A rank that is the only
one on its node removes the lock files of killed processes.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from evolve_ray.errors import UserError, first_line

_open_files: list[int] = []  # file descriptors that hold the kernel lock until the process ends


def lock_build_folder(folder: Path | None = None) -> Path:
    """Creates and locks the folder of compiled operators, and returns it. Call it before anything is compiled.

    The folder is TORCH_EXTENSIONS_DIR if that is set, otherwise `evolve-ray/operators` in the user's cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = folder or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "evolve-ray" / "operators")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".ranks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # other ranks use the folder; the first of them has removed the old lock files
    else:
        for lock_file in folder.rglob("lock"):
            lock_file.unlink(missing_ok=True)
    fcntl.flock(file, fcntl.LOCK_SH)
    _open_files.append(file)
    return folder


@contextlib.contextmanager
def explain_errors() -> Iterator[None]:
    """Raises UserError if DeepSpeed rejects an option of `trainer.deepspeed`; other errors pass unchanged."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        raise UserError(f"trainer.deepspeed: DeepSpeed does not accept it: {' '.join(str(error).split())}") from None
    except RuntimeError as error:
        if "Unable to JIT load" not in str(error):
            raise
        raise UserError(
            f"trainer.deepspeed: needs an operator that DeepSpeed cannot build: {first_line(error)}; install its "
            "requirements on every node (async_io: libaio-dev), or remove the option"
        ) from None
