"""Is a run what it says: `jobs/verify.py RUN` checks every manifest and hash, what was made from what, and every row.

Nothing is changed. A run that is not finished is sound: what is to do is listed, with the command that does it.
"""

import argparse
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from evolve_ray.audit import conservation
from evolve_ray.audit.explain import read_config
from evolve_ray.config.options import Config
from evolve_ray.errors import IntegrityError, run_command
from evolve_ray.plan import plan
from evolve_ray.store.manifest import CARD, MANIFEST, Manifest, file_faults, read_manifest
from evolve_ray.store.places import check_uri, is_uri
from evolve_ray.store.run import Run
from evolve_ray.store.sync import fetched

SHOWN = 20  # faults of one folder


@dataclass
class Findings:
    """What was found: committed folders by their place in the run, faults by the folder to delete, stages to do."""

    committed: dict[str, Manifest] = field(default_factory=dict)
    parts: dict[str, Manifest] = field(default_factory=dict)  # stages inside a committed stage, and shards of one in the making
    faults: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)  # by iteration

    def blame(self, place: str, fault: str) -> None:
        self.faults.setdefault(place, []).append(fault)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 for a sound run, 4 for one that is not; the last line on stderr is one sentence."""
    parser = argparse.ArgumentParser(prog="verify.py", description="Checks every file and row that a run has committed.")
    parser.add_argument("run", metavar="RUN", help="a run directory, or s3://BUCKET/PREFIX: it is fetched to a temporary folder")
    given = parser.parse_args(arguments)

    def command() -> int:
        if not is_uri(given.run):
            return tell(Path(given.run), lambda said: said)
        uri, _ = check_uri(given.run)
        with fetched(uri) as folder:
            return tell(folder, lambda said: said.replace(str(folder), uri).replace("rm -r ", "delete "))

    return run_command(command, shlex.join(["python", "jobs/verify.py", *arguments]))


def tell(root: Path, named: Callable[[str], str]) -> int:
    """Prints what was found and raises the first fault, in the words of `named`: the run may be known by another name."""
    found = verify(root)
    print(named(text(root, found)))
    if found.faults:
        first = next(iter(found.faults.values()))[0]
        count = f"{len(found.faults)} folder{'s' * (len(found.faults) > 1)}"
        raise IntegrityError(named(f"{root}: {count} not as committed: {first}; repair with: {repair(root, found)}"))
    return 0


def verify(root: Path) -> Findings:
    """Everything that can be said of a run from its files alone."""
    config, run, found = read_config(root), Run(root), Findings()
    for iteration in iterations(root):
        for folder in sorted(path for path in iteration.iterdir() if path.is_dir()):
            if not folder.name.startswith("."):
                check_folder(root, folder, found)
            elif not folder.name.startswith((".superseded-", ".ray-train-")):
                check_making(root, folder, found)
    check_sequence(config, run, found)
    every, damaged = found.committed | found.parts, tuple(found.faults)
    sound = {place: manifest for place, manifest in every.items() if not f"{place}/".startswith(tuple(f"{d}/" for d in damaged))}
    if not found.faults:  # else a damaged manifest would be blamed on all that was made from it
        check_origins(found)
    by_name = known(found)
    for place, manifest in sound.items():
        made_from = {name: by_name[value] for name, value in manifest.inputs.items() if by_name.get(value) in sound.values()}
        for fault in conservation.check(manifest, made_from):
            found.blame("/".join(place.split("/")[:2]), f"{root / place}: {fault}")
    return found


def iterations(root: Path) -> list[Path]:
    return [path for path in sorted(root.glob("iteration-*")) if path.is_dir() and path.name[10:].isdecimal()]


def expected_iterations(config: Config, run: Run) -> Iterator[int]:
    """0 and on, up to the recipe's number or to where the controller ended the run."""
    for number in range(config.iterations + 1):
        yield number
        try:
            if json.loads((run.iteration(number) / "decision" / "decision.json").read_bytes())["action"] != "continue":
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass


def check_sequence(config: Config, run: Run, found: Findings) -> None:
    """What is to do, and what is gone: a stage that is not there though a later one is."""
    numbers = list(expected_iterations(config, run))
    places = [(number, name) for number in numbers for name in plan.stages(config, number)]
    places.sort(key=lambda place: place[1] not in ("held_out", "activation_pairs", "offline_pairs", "prompts"))  # all come first
    there = [(run.iteration(number) / name).exists() for number, name in places]
    last = max((at for at, is_there in enumerate(there) if is_there), default=-1)
    for at, (number, name) in enumerate(places):
        if not there[at]:
            folder = run.iteration(number).name
            found.missing.setdefault(folder, []).append(name)
            if at < last:
                found.blame(f"{folder}/{name}", f"{run.root / folder / name}: is gone, though {places[last][1]} came after it")


def check_folder(root: Path, folder: Path, found: Findings) -> None:
    """A committed stage: its manifest, every file of it, and nothing that it does not list."""
    place = folder.relative_to(root).as_posix()
    try:
        manifest = read_manifest(folder)
    except IntegrityError as error:
        found.blame(place, str(error).split("; ")[0])
        return
    if manifest is None:
        found.blame(place, f"{folder}: has no {MANIFEST}, so nothing can be committed under its name")
        return
    found.committed[place] = manifest
    for fault in [*file_faults(manifest), *strangers(manifest)]:
        found.blame(place, fault)
    if place not in found.faults:
        inner = [read_manifest(path.parent) for path in sorted(folder.glob(f"*/**/{MANIFEST}"))]
        found.parts |= {part.folder.relative_to(root).as_posix(): part for part in inner if part and part.stage != "shard"}


def strangers(manifest: Manifest) -> Iterator[str]:
    """Files that stand in a committed folder without being in its manifest."""
    for path in sorted(manifest.folder.rglob("*")):
        name = path.relative_to(manifest.folder).as_posix()
        if path.is_file() and name not in manifest.files and name not in (MANIFEST, CARD):
            yield f"{path}: is not in the manifest of its folder"


def check_making(root: Path, folder: Path, found: Findings) -> None:
    """The working folder of a stage: what is committed in it will be used, so it is checked too."""
    for path in sorted(folder.rglob(MANIFEST)):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            manifest = read_manifest(path.parent, verify=True)
        except IntegrityError as error:
            found.blame(path.parent.relative_to(root).as_posix(), str(error).split("; ")[0])
            continue
        if manifest and manifest.stage not in ("shard", "step"):
            found.parts[path.parent.relative_to(root).as_posix()] = manifest


def known(found: Findings) -> dict[str, Manifest]:
    """Manifests by what the `inputs` of others call them: identity, or key where two stages run as one pipeline."""
    every = [*found.committed.values(), *found.parts.values()]
    return {manifest.key: manifest for manifest in every} | {manifest.identity: manifest for manifest in every}


def check_origins(found: Findings) -> None:
    """What a stage was made from stands in the run, byte for byte."""
    by_name = known(found)
    for place, manifest in found.committed.items():
        for name, value in manifest.inputs.items():
            if value not in by_name:
                found.blame(place, f"{manifest.folder}: was made from other {name} ({value[:12]}) than stand in the run now")


def command_of(root: Path) -> str:
    """The command that made the run, from its last start; events of a run that was killed may end in half a line."""
    command = ""
    try:
        for line in (root / "events.jsonl").read_bytes().splitlines():
            try:
                event = json.loads(line)
                if event["event"] == "driver_start":
                    command = str(event["command"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    except OSError:
        pass
    return command or f"python jobs/iterate.py RECIPE.toml --run {shlex.quote(str(root))}"


def repair(root: Path, found: Findings) -> str:
    """What computes again what is damaged or gone, and nothing else."""
    damaged = [shlex.quote(str(root / place)) for place in found.faults if (root / place).exists()]
    return (f"rm -r {' '.join(damaged)} && " if damaged else "") + command_of(root)


def text(root: Path, found: Findings) -> str:
    """The findings for people."""
    files = [file for manifest in found.committed.values() for file in manifest.files.values()]
    size = sum(file["bytes"] for file in files if isinstance(file.get("bytes"), int))
    lines = [f"run in {root}", "", f"committed: {len(found.committed)} stages, {len(files)} files, {size / 2**20:,.1f} MiB"]
    for place, manifest in found.committed.items():
        told = [name for name in ("num_in", "num_rows", "num_rejected") if name in manifest.stats]
        counts = ", ".join(f"{name.removeprefix('num_')} {manifest.stats[name]}" for name in told)
        lines.append(f"  {place}: {'NOT SOUND' if place in found.faults else 'sound'}" + (f" ({counts})" if counts else ""))
    for faults in found.faults.values():
        lines += ["", *faults[:SHOWN]] + ([f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else [])
    if found.missing:
        lines += ["", "to do:", *(f"  {name}: {', '.join(stages)}" for name, stages in found.missing.items())]
    if found.faults:
        lines += ["", f"repair with: {repair(root, found)}"]
    elif found.missing:
        lines += ["", f"sound; continue with: {command_of(root)}"]
    else:
        lines += ["", "sound and complete"]
    return "\n".join(lines)
