"""Plugs: one of this package by its short name, your own as `module:Name`.

A fault of a plug of your own ends in one sentence that names the plug, its row and the line of its file. The plug's traceback
travels with the error to the driver, which stores it in events.jsonl.
"""

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evolve_ray.config.parse import Reader
from evolve_ray.errors import EvolveError, UserError, first_line, is_full_disk, is_full_memory, is_lost_process

SHOWN = 60  # characters of a text that a message quotes


def is_own(name: str) -> bool:
    """Whether a name of a recipe is somebody's own plug, and not one of this package."""
    return ":" in name and not name.startswith("evolve_ray.")


def find_plug(plugs: dict[str, Any], name: str, field: str) -> Any:
    """The plug with a short name in `plugs`, or `module:Name`. Raises `UserError` with `field` if it cannot be loaded."""
    if name in plugs:
        return plugs[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        place = where(error, name)
        raise UserError(
            f"{field}: {name!r} cannot be loaded: {error}{place and f' ({place})'}; check the name and the Python path"
        ) from None
    except Exception as error:
        place = f"{Path(error.filename or '').name}:{error.lineno}" if isinstance(error, SyntaxError) else where(error, name)
        raise UserError(
            f"{field}: {name!r} cannot be loaded: {type(error).__name__}: {getattr(error, 'msg', first_line(error))}"
            f"{place and f', at {place}'}; fix the plug, then submit the same command again"
        ) from None


@contextlib.contextmanager
def blame(field: str, name: str, row: str = "") -> Iterator[None]:
    """Turns an error inside somebody's own plug into a `UserError` with the plug, the row and the line of the plug's file.

    Errors of a full disk or memory, of lost processes, and those that are one sentence already pass unchanged.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, EvolveError) or is_full_disk(error) or is_full_memory(error) or is_lost_process(error)
        if known or not is_own(name):
            raise
        place = where(error, name)
        fault = UserError(
            f"{field}: {name!r} raised {type(error).__name__}: {short(first_line(error), 200)}"
            f"{f', at {place}' if place else ''}{f', for {row}' if row else ''}; fix the plug, then submit the same command "
            "again; its traceback is in events.jsonl"
        )
        fault.log = traceback.format_exc()
        raise fault from error


def where(error: BaseException, name: str) -> str:
    """`file.py:LINE` of the last line of the plug's own files in a traceback; "" if it has none."""
    root, place = source_root(name), ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if root and file.is_relative_to(root) and not is_package_file(file):
            place = f"{file.relative_to(root)}:{line}"
    return place


def is_package_file(file: Path) -> bool:
    """Whether a file belongs to this package, or to an installed one."""
    return file.is_relative_to(Path(__file__).parents[1]) or "site-packages" in file.parts


def source_root(name: str) -> Path | None:
    """The folder from which a plug's module is imported; None if it has no file."""
    module = name.partition(":")[0]
    file = source_file(module)
    return None if file is None else file.parents[module.count(".") + (file.name == "__init__.py")]


def source_file(module: str) -> Path | None:
    """The Python file of a module, loaded or not; None if it has none."""
    loaded = sys.modules.get(module)
    try:
        spec = loaded.__spec__ if loaded else importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    origin = getattr(spec, "origin", None)
    return Path(origin).resolve() if origin and origin.endswith(".py") else None


def sources(*names: str) -> dict[str, dict[str, str]]:
    """`{"plugs": {name: hash of its source}}` of somebody's own plugs among `names`, for a stage key; {} if there are none."""
    hashes = {name: source_hash(name) for name in sorted(set(names)) if is_own(name)}
    return {"plugs": hashes} if hashes else {}


@functools.cache
def source_hash(name: str) -> str:
    """The hash of a plug's file and of every file that it imports from its own folder, directly or through another one.

    Imports inside functions count; this package and installed ones do not.
    """
    module = name.partition(":")[0]
    root, first = source_root(name), source_file(module)
    if root is None or first is None:
        return "no source"
    files: dict[str, bytes] = {}
    todo = [(module, first)]
    while todo:
        module, file = todo.pop()
        if str(file.relative_to(root)) in files:
            continue
        content = files[str(file.relative_to(root))] = file.read_bytes()
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for imported in imported_modules(content, package):
            path = root.joinpath(*imported.split("."))
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                if candidate.is_file() and not is_package_file(candidate):
                    todo.append((imported, candidate))
    parts = [part for path in sorted(files) for part in (path.encode(), hashlib.sha256(files[path]).digest())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def imported_modules(content: bytes, package: str) -> set[str]:
    """The dotted names that a file in `package` imports; of `from a import b` both `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name.strip(".")}


def check_call(
    field: str, name: str, call: Any, names: tuple[str, ...], what: str = "", extras: tuple[str, ...] = ()
) -> None:  # fmt: skip
    """Raises `UserError` unless `call` can be called with the arguments `names`, in this order.

    It may take `args` and `extras` beside them, by name, and further arguments that have defaults.
    """
    if not callable(call):
        raise UserError(f"{field}: {name!r} is of type {type(call).__name__}, but must take {what}({', '.join(names)})")
    try:
        signature = inspect.signature(call)
        signature.bind(*names, **{extra: {} for extra in ("args", *extras) if extra in signature.parameters})
    except TypeError as error:
        raise UserError(
            f"{field}: {name!r} must take {what}({', '.join(names)}), but takes {signature}: {error}; {line_of(call)}"
        ) from None
    except ValueError:  # a built-in without a signature
        return


def takes(call: Callable, name: str) -> bool:
    """Whether `call` has a parameter of this name."""
    try:
        return name in inspect.signature(call).parameters
    except (TypeError, ValueError):
        return False


def line_of(call: Any) -> str:
    """`see file.py:LINE` of a function or class, for a message."""
    try:
        return f"see {Path(inspect.getsourcefile(call) or '').name}:{inspect.getsourcelines(call)[1]}"
    except (TypeError, OSError):
        return "fix its signature"


def with_args(field: str, name: str, call: Callable, table: dict) -> Callable:
    """`call` with its table of options as the argument `args`, if it takes one.

    An `args` that is annotated with a dataclass of `option(...)` fields gets that class, after the checks of every option; any
    other `args` gets the table itself. Raises `UserError` for a wrong or unknown option, and for a table that nobody reads.
    """
    try:
        parameters = inspect.signature(call, eval_str=True).parameters
    except (NameError, ValueError):
        parameters = inspect.signature(call).parameters if not isinstance(call, type) else {}  # type: ignore[assignment]
    if "args" not in parameters:
        if table:
            raise UserError(f"{field}: holds {', '.join(table)}, but {name!r} takes no `args`; remove the table")
        return call
    kind = parameters["args"].annotation
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return functools.partial(call, args=Reader("recipe", "", set()).build(kind, table, field))
    return functools.partial(call, args=table)


def short(text: str, limit: int = SHOWN) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
