"""The operators that DeepSpeed compiles at first use, in a folder of our own that no killed process blocks; what it refuses.

torch guards a build with a file named `lock`, which whoever is killed meanwhile leaves behind; all who come after wait for
it for ever. So every rank holds a lock of the kernel's, which ends with its process: whoever finds nobody else on the node
takes away what killed ones left.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from evolve_ray.errors import UserError, first_line

_held: list[int] = []  # open for as long as the process lives


def settle(folder: Path | None = None) -> Path:
    """Makes the folder of compiled operators usable and binds this process to it; call before anything is compiled.

    TORCH_EXTENSIONS_DIR, where it is set, stays what it is; the default is `evolve-ray/operators` in the user's cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = folder or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "evolve-ray" / "operators")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder / ".ranks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # others are at work here, one of whom came first
    else:
        for left in folder.rglob("lock"):
            left.unlink(missing_ok=True)
    fcntl.flock(held, fcntl.LOCK_SH)
    _held.append(held)
    return folder


@contextlib.contextmanager
def refusals_named() -> Iterator[None]:
    """What DeepSpeed does not take of `trainer.deepspeed` is the user's to mend; any other error passes."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        raise UserError(f"trainer.deepspeed: DeepSpeed does not take it: {' '.join(str(error).split())}") from None
    except RuntimeError as error:
        if "Unable to JIT load" not in str(error):
            raise
        raise UserError(
            f"trainer.deepspeed: asks for an operator that DeepSpeed cannot build here: {first_line(error)}; install what "
            "it needs on every node (async_io: libaio-dev), or leave the option out"
        ) from None
