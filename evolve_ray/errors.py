"""The errors a user can meet: each is one sentence that names the field, file or row and the way out.

They take exactly one argument so that they survive pickling between Ray processes.
"""

import sys
from collections.abc import Callable


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


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def run_command(command: Callable[[], int], again: str) -> int:
    """The exit code of a command; a known fault is one sentence on stderr, its last line. `again` is the command as typed."""
    try:
        return command()
    except KeyboardInterrupt:
        print(f"interrupted; what is committed stays; continue with: {again}", file=sys.stderr)
        return 130
    except EvolveError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
