"""The errors a user can meet: each is one sentence that names the field, file or row and the way out.

They take exactly one argument so that they survive pickling between Ray processes.
"""


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


def find_cause(error: BaseException) -> EvolveError | None:
    """The first `EvolveError` in the chain of causes of `error`; Ray wraps what a worker raised."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        if isinstance(current, EvolveError):
            # Ray makes a class that inherits from the cause; give back the plain one, free of its traceback text.
            for kind in (UserError, LockedError, IntegrityError, ResourceError, NumericsError, StalledError):
                if isinstance(current, kind):
                    cause = getattr(current, "cause", None)
                    return cause if isinstance(cause, kind) else current
            return current
        seen.add(id(current))
        queue += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    return None
