"""Finds the models that a command line names: a model folder, a hub name, or a model of a run.

`RUN` is the last model in the run's report.json that was not rolled back. `RUN@base`, `RUN@activation` and `RUN@2` are models
that the run evaluated before it.
"""

import collections
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.models import folders
from evolve_ray.store.manifest import read_manifest


@dataclass(frozen=True)
class Named:
    """A model folder with a short name. `given` is the argument of the command; `run` is the model's run directory, if any."""

    name: str
    given: str
    folder: Path
    hash: str
    run: Path | None = None

    @property
    def slug(self) -> str:
        """A folder name that no other model has."""
        return f"{re.sub(r'[^A-Za-z0-9@._-]+', '-', self.name).strip('-.')[-60:]}-{self.hash[:12]}"


def find_all(arguments: list[str]) -> list[Named]:
    """The models in the order of the arguments. Models with the same short name are called by their arguments instead."""
    for argument, count in collections.Counter(arguments).items():
        if count > 1:
            raise UserError(f"MODEL {argument}: is given {count} times; name each model once")
    models = [find(argument) for argument in arguments]
    name_counts = collections.Counter(model.name for model in models)
    return [model if name_counts[model.name] == 1 else replace(model, name=model.given) for model in models]


def find(argument: str) -> Named:
    """The model that an argument names. The content hash of a run's model must be the one in the run's report."""
    path, at, model_name = argument.rpartition("@")
    if at and is_run(Path(path)):
        return find_in_run(argument, Path(path), model_name)
    if is_run(Path(argument)):
        return find_in_run(argument, Path(argument), "")
    folder = folders.resolve(argument, f"MODEL {argument}")
    name = Path(argument).name if Path(argument).is_dir() else argument
    return Named(name, argument, folder, folders.content_hash(folder))


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / "events.jsonl").exists() or (folder / "report.json").exists()


def find_in_run(argument: str, run: Path, model_name: str) -> Named:
    """The model of a run by its name in the report; without a name the last one that was not rolled back.

    Raises UserError if the report has no such model or its folder is missing, IntegrityError if its content has changed.
    """
    report = read_report(run)
    models = {short_name(model["name"]): model for model in report["models"]}
    usable = [name for name, model in models.items() if not model.get("rolled_back")]
    name = short_name(model_name) if model_name else usable[-1]
    if name not in models:
        choices = ", ".join(f"{run}@{known}" for known in models)
        raise UserError(f"MODEL {argument}: the run has no model {model_name!r}; it has {choices}")
    model = models[name]
    folder = relocate(Path(model["path"]), Path(report["run"]), run)
    if not folder.is_dir():
        raise UserError(f"MODEL {argument}: {folder}: does not exist, but {run}/report.json lists it; use a model that exists")
    read_manifest(folder, verify=True)
    content_hash = folders.content_hash(folder)
    if content_hash != model["model"]:
        raise IntegrityError(
            f"MODEL {argument}: {folder}: its content hash is {content_hash[:12]}, but {run}/report.json has "
            f"{model['model'][:12]}: it was changed after its evaluation; name the folder itself, or run the recipe again"
        )
    return Named(f"{run.resolve().name}@{name}", argument, folder, content_hash, run)


def read_report(run: Path) -> dict[str, Any]:
    """The report.json of a run directory; it has at least one model."""
    path = run / "report.json"
    try:
        report = json.loads(path.read_bytes())
        if not report["models"]:
            raise KeyError("models")
        return report
    except FileNotFoundError:
        raise UserError(f"{run}: has no report.json yet, because no iteration is finished; name a model folder instead") from None
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path}: is damaged; submit the command of the run again to write a new one") from None


def short_name(name: str) -> str:
    """`iteration 2` -> `2`."""
    return name.removeprefix("iteration ").strip()


def relocate(path: Path, recorded_run: Path, run: Path) -> Path:
    """The present place of a path from the report, if the run directory has moved since, alone or with its parent folder."""
    if path.is_dir():
        return path
    for old, new in ((recorded_run, run.resolve()), (recorded_run.parent, run.resolve().parent)):
        if path.is_relative_to(old):
            return new / path.relative_to(old)
    return path
