"""Which further models the source of a strategy names, and what is wrong with a name that the recipe lacks."""

import ast
import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection
from pathlib import Path


def unknown_model(name: str, models: Collection[str]) -> str:
    """What is wrong with the model that an ask names; "" if nothing is. `models` are those of the recipe."""
    if not name or name in models:
        return ""
    nearest = difflib.get_close_matches(name, models, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"[models] has {', '.join(models) or 'none'}"
    return f"asks the model {name!r}; {hint}"


def named_models(strategy: Callable) -> list[tuple[str, str]]:
    """(name, `FILE.py:LINE`) of each model that the source of a strategy names as `Ask(..., model="NAME")`."""
    while isinstance(strategy, functools.partial):
        strategy = strategy.func
    try:
        lines, first = inspect.getsourcelines(strategy)
        file, tree = Path(inspect.getsourcefile(strategy) or "").name, ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return []  # a name that cannot be read here is checked when it is asked
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    asks = [node for node in calls if "Ask" in (getattr(node.func, "id", ""), getattr(node.func, "attr", ""))]
    named = [keyword.value for ask in asks for keyword in ask.keywords if keyword.arg == "model"]
    texts = [node for node in named if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(str(node.value), f"{file}:{first + node.lineno - 1}") for node in texts]
