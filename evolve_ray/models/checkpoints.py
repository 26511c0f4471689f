"""Models by the names that a command gives them: a folder, a hub name, a run's last checkpoint, or one of its earlier models.

`RUN` is the last model of the run's report.json that was not rolled back; `RUN@base`, `RUN@activation` and `RUN@2` are what
it evaluated before.
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
    """A model folder under a short name; `run` is the run directory that it came from, if any."""

    name: str
    given: str
    folder: Path
    hash: str
    run: Path | None = None

    @property
    def slug(self) -> str:
        """A folder name that no other model shares."""
        return f"{re.sub(r'[^A-Za-z0-9@._-]+', '-', self.name).strip('-.')[-60:]}-{self.hash[:12]}"


def find_all(given: list[str]) -> list[Named]:
    """The models in the given order, under names that tell them apart."""
    for text, count in collections.Counter(given).items():
        if count > 1:
            raise UserError(f"MODEL {text}: is given {count} times; name each model once")
    found = [find(text) for text in given]
    taken = collections.Counter(model.name for model in found)
    return [model if taken[model.name] == 1 else replace(model, name=model.given) for model in found]


def find(given: str) -> Named:
    """One model, checked against the hash that its run's report has for it."""
    path, at, which = given.rpartition("@")
    if at and is_run(Path(path)):
        return of_run(given, Path(path), which)
    if is_run(Path(given)):
        return of_run(given, Path(given), "")
    folder = folders.resolve(given, f"MODEL {given}")
    return Named(Path(given).name if Path(given).is_dir() else given, given, folder, folders.content_hash(folder))


def is_run(folder: Path) -> bool:
    return (folder / "events.jsonl").exists() or (folder / "report.json").exists()


def of_run(given: str, run: Path, which: str) -> Named:
    report = read_report(run)
    known = {short_name(model["name"]): model for model in report["models"]}
    kept = [name for name, model in known.items() if not model.get("rolled_back")]
    wanted = short_name(which) if which else kept[-1]
    if wanted not in known:
        raise UserError(f"MODEL {given}: the run has no model {which!r}; it has {', '.join(f'{run}@{name}' for name in known)}")
    model = known[wanted]
    folder = moved(Path(model["path"]), Path(report["run"]), run)
    if not folder.is_dir():
        raise UserError(f"MODEL {given}: {folder}: is gone, but {run}/report.json names it; give a model that is there")
    read_manifest(folder, verify=True)
    found = folders.content_hash(folder)
    if found != model["model"]:
        raise IntegrityError(
            f"MODEL {given}: {folder}: its content hash is {found[:12]}, but {run}/report.json says {model['model'][:12]}; "
            "it was changed after its evaluation: give the folder itself, or run the recipe again"
        )
    return Named(f"{run.resolve().name}@{wanted}", given, folder, found, run)


def read_report(run: Path) -> dict[str, Any]:
    """report.json of a run directory with at least one model in it."""
    path = run / "report.json"
    try:
        report = json.loads(path.read_bytes())
        if not report["models"]:
            raise KeyError("models")
        return report
    except FileNotFoundError:
        raise UserError(f"{run}: has no report.json yet: no iteration is finished; give a model folder instead") from None
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path}: is damaged; submit the run's own command again to write it anew") from None


def short_name(name: str) -> str:
    """`iteration 2` -> `2`."""
    return name.removeprefix("iteration ").strip()


def moved(path: Path, recorded: Path, run: Path) -> Path:
    """Where a recorded path is if the run directory has moved since, with what stands beside it."""
    if path.is_dir():
        return path
    for old, new in ((recorded, run.resolve()), (recorded.parent, run.resolve().parent)):
        if path.is_relative_to(old):
            return new / path.relative_to(old)
    return path
