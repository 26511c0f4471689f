"""The errors a user can meet: each is one sentence that names the field, file or row and the way out.

They take exactly one argument so that they survive pickling between Ray processes.
"""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # what a disk can say to a write
FULL = ("No space left on device", "Disk quota exceeded", "inline_container.cc")  # and writers of torch and safetensors in turn


class EvolveError(Exception):
    """Base of all errors that end the command with one sentence instead of a traceback."""

    exit_code = 1


class UserError(EvolveError):
    """The recipe, a file or a model is not usable as it is."""

    exit_code = 2


class LockedError(EvolveError):
    """Another driver works on this run directory."""

    exit_code = 3


class IntegrityError(EvolveError):
    """A committed file is not what its manifest says, or rows were lost or duplicated."""

    exit_code = 4


class ResourceError(EvolveError):
    """The machine or cluster lacks disk, memory, or a process that the stage needs."""

    exit_code = 5


class NumericsError(EvolveError):
    """A number is not finite; the run stopped before it touched the weights."""

    exit_code = 6


class StalledError(EvolveError):
    """A stage made no progress for longer than its deadline."""

    exit_code = 7


def pack(error: EvolveError) -> dict[str, str]:
    """An error as plain data, to cross a process boundary that would lose its class or wrap its text."""
    plain = getattr(error, "cause", error)  # Ray raises a class of its own that holds the original as `cause`
    kind = next(kind for kind in type(plain).__mro__ if kind in EvolveError.__subclasses__())
    return {"kind": kind.__name__, "message": str(plain)}


def unpack(packed: dict[str, str]) -> EvolveError:
    """The error that `pack` was given."""
    return {kind.__name__: kind for kind in EvolveError.__subclasses__()}[packed["kind"]](packed["message"])


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk refused a write, also where a library made an error of its own of that."""
    return (isinstance(error, OSError) and error.errno in DISK) or any(sign in str(error) for sign in FULL)


def is_full_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's on a GPU or in memory, or Python's own."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def is_lost_process(error: BaseException) -> bool:
    """Whether Ray says that a process, its node or what it held is gone; a command that never had a Ray does not load it."""
    lost = getattr(sys.modules.get("ray"), "exceptions", None)
    if lost is None or getattr(error, "actor_init_failed", False):  # that one did not start, for an error of its own
        return False
    return isinstance(error, lost.RayActorError | lost.WorkerCrashedError | lost.NodeDiedError | lost.ObjectLostError)


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException | str) -> str:
    """What an error says, or a text, in one line that a terminal can only print: what came from a file cannot steer it."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(error))


_taken: list[int] = []  # SIGTERM, if it came: where Ray waits, it makes a plain KeyboardInterrupt of all that a handler raises


def on_sigterm(number: int, *_: object) -> None:
    _taken.append(number)
    raise KeyboardInterrupt


def run_command(command: Callable[[], int], again: str) -> int:
    """The exit code of a command; a known fault is one sentence on stderr, its last line. `again` is the command as typed."""
    _taken.clear()
    with contextlib.suppress(ValueError):  # not in the main thread: whoever has that decides
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        return command()
    except KeyboardInterrupt:
        how, code = ("ended by SIGTERM", 143) if _taken else ("interrupted", 130)
        print(f"{how}; what is committed stays; continue with: {again}", file=sys.stderr)
        return code
    except EvolveError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(
            f"error: {error.filename or 'the disk'}: {error.strerror}; free space, then continue with: {again}", file=sys.stderr
        )
        return ResourceError.exit_code
    except Exception as error:
        if not is_lost_process(error):
            raise
        what = " ".join(" ".join(str(error).splitlines()[:2]).split()).rstrip(".")  # what died
        print(f"error: ray: {one_line(what)}; see the Ray dashboard (often memory); continue with: {again}", file=sys.stderr)
        return ResourceError.exit_code
