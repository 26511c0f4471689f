"""The errors that a user can meet: each is one line that names the field, file or row, says what is wrong and what to do.

They take exactly one argument, so that they can be pickled between Ray processes.
"""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable

DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # of a disk that is full, read-only or broken
# The same errors in the messages of torch and safetensors, which lose the errno.
DISK_MESSAGES = ("No space left on device", "Disk quota exceeded", "inline_container.cc")


class EvolveError(Exception):
    """Base of all errors that end the command with one line instead of a traceback."""

    exit_code = 1
    log = ""  # a traceback for events.jsonl; the user is told the one line


class UserError(EvolveError):
    """The recipe, a file or a model cannot be used as it is."""

    exit_code = 2


class LockedError(EvolveError):
    """Another driver works on this run directory."""

    exit_code = 3


class IntegrityError(EvolveError):
    """A committed file does not match its manifest, or rows were lost or duplicated."""

    exit_code = 4


class ResourceError(EvolveError):
    """The machine or cluster lacks disk or memory, or has lost a process that the stage needs."""

    exit_code = 5


class NumericsError(EvolveError):
    """A number is not finite; the run stopped before it changed the weights."""

    exit_code = 6


class StalledError(EvolveError):
    """A stage made no progress for longer than its deadline."""

    exit_code = 7


def pack(error: EvolveError) -> dict[str, str]:
    """Returns an error as plain data, to pass a process boundary that would lose its class or wrap its message."""
    original = error
    while isinstance(cause := getattr(original, "cause", None), EvolveError):
        original = cause  # Ray raises a class of its own, which has the original error as `cause`, also several times over
    kind = next(kind for kind in type(original).__mro__ if kind in EvolveError.__subclasses__())
    return {"kind": kind.__name__, "message": str(original)} | ({"log": original.log} if original.log else {})


def unpack(packed: dict[str, str]) -> EvolveError:
    """Returns the error that `pack` has packed."""
    error = {kind.__name__: kind for kind in EvolveError.__subclasses__()}[packed["kind"]](packed["message"])
    error.log = packed.get("log", "")
    return error


def failure(error: BaseException) -> dict[str, str]:
    """What the event `driver_failed` says of an error; with the traceback of a plug if it has one."""
    log = error.log if isinstance(error, EvolveError) else ""
    return {"error": f"{type(error).__name__}: {error}"[:2000]} | ({"traceback": log} if log else {})


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk refused a write, also if a library raised its own error for that."""
    return (isinstance(error, OSError) and error.errno in DISK_ERRNOS) or any(text in str(error) for text in DISK_MESSAGES)


def is_full_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of torch on a GPU or in host memory, or of Python."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def is_lost_process(error: BaseException) -> bool:
    """Whether Ray reports that a process, its node or an object of it is lost; does not import Ray if the command has not."""
    exceptions = getattr(sys.modules.get("ray"), "exceptions", None)
    if exceptions is None or getattr(error, "actor_init_failed", False):  # the actor's own __init__ raised an error
        return False
    return isinstance(
        error,
        exceptions.RayActorError | exceptions.WorkerCrashedError | exceptions.NodeDiedError | exceptions.ObjectLostError,
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException | str) -> str:
    """Returns a message in one line, with control characters escaped: text from a file must not control the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(error))


# SIGTERM, if the process received it. It is recorded here because Ray, while it waits, turns every error of a signal handler
# into a plain KeyboardInterrupt.
_received: list[int] = []


def on_sigterm(number: int, *_: object) -> None:
    """Handles SIGTERM like an interrupt, and records it for `run_command`."""
    _received.append(number)
    raise KeyboardInterrupt


def run_command(command: Callable[[], int], command_line: str) -> int:
    """Runs a command and returns its exit code; a known error is one line on stderr, the last one.

    `command_line` is the command as the user typed it. Other errors are raised.
    """
    _received.clear()
    with contextlib.suppress(ValueError):  # outside of the main thread no handler can be set
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        return command()
    except KeyboardInterrupt:
        how, code = ("ended by SIGTERM", 143) if _received else ("interrupted", 130)
        print(f"{how}; committed work is kept; continue with: {command_line}", file=sys.stderr)
        return code
    except EvolveError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of the output has ended, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        print(
            f"error: {error.filename or 'the disk'}: {error.strerror}; free space, then continue with: {command_line}",
            file=sys.stderr,
        )
        return ResourceError.exit_code
    except Exception as error:
        if not is_lost_process(error):
            raise
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split()).rstrip(".")
        print(
            f"error: ray: {one_line(reason)}; see the Ray dashboard (often out of memory); continue with: {command_line}",
            file=sys.stderr,
        )
        return ResourceError.exit_code
