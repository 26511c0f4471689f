"""The command `jobs/verify.py RUN`: checks every manifest, every hash, the inputs of every stage, and every row.

It changes nothing. An unfinished run is no error: the stages to do are listed, with the command that continues the run.
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

SHOWN = 20  # faults listed for one folder


@dataclass
class Findings:
    """The result: committed folders by their path in the run, faults by the folder to delete, stages to do by iteration."""

    committed: dict[str, Manifest] = field(default_factory=dict)
    parts: dict[str, Manifest] = field(default_factory=dict)  # stages inside a committed stage, and those inside a working folder
    faults: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)  # by iteration

    def add_fault(self, place: str, fault: str) -> None:
        self.faults.setdefault(place, []).append(fault)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 for a run without faults, 4 otherwise; the last line on stderr is one sentence."""
    parser = argparse.ArgumentParser(prog="verify.py", description="Checks every file and row that a run has committed.")
    parser.add_argument(
        "run", metavar="RUN", help="a run directory, or s3://BUCKET/PREFIX, which is fetched to a temporary folder"
    )
    args = parser.parse_args(arguments)

    def command() -> int:
        if not is_uri(args.run):
            return report(Path(args.run), lambda message: message)
        uri, _ = check_uri(args.run)
        with fetched(uri) as folder:
            return report(folder, lambda message: message.replace(str(folder), uri).replace("rm -r ", "delete "))

    return run_command(command, shlex.join(["python", "jobs/verify.py", *arguments]))


def report(root: Path, named: Callable[[str], str]) -> int:
    """Prints the findings and raises an error for the first fault; `named` replaces the name of a fetched run's folder."""
    findings = verify(root)
    print(named(text(root, findings)))
    if findings.faults:
        first = next(iter(findings.faults.values()))[0]
        count = f"{len(findings.faults)} folder{'s' * (len(findings.faults) > 1)}"
        raise IntegrityError(named(f"{root}: {count} with errors: {first}; repair with: {repair(root, findings)}"))
    return 0


def verify(root: Path) -> Findings:
    """Returns all findings about a run, from its files alone."""
    config, run, findings = read_config(root), Run(root), Findings()
    for iteration in iterations(root):
        for folder in sorted(path for path in iteration.iterdir() if path.is_dir()):
            if not folder.name.startswith("."):
                check_folder(root, folder, findings)
            elif not folder.name.startswith((".superseded-", ".ray-train-")):
                check_working_folder(root, folder, findings)
    check_sequence(config, run, findings)
    manifests, damaged = findings.committed | findings.parts, tuple(findings.faults)
    prefixes = tuple(f"{place}/" for place in damaged)
    undamaged = {place: manifest for place, manifest in manifests.items() if not f"{place}/".startswith(prefixes)}
    if not findings.faults:  # otherwise a damaged manifest would also blame every stage computed from it
        check_inputs(findings)
    by_input = manifests_by_input(findings)
    for place, manifest in undamaged.items():
        inputs = {name: by_input[value] for name, value in manifest.inputs.items() if by_input.get(value) in undamaged.values()}
        for fault in conservation.check(manifest, inputs):
            findings.add_fault("/".join(place.split("/")[:2]), f"{root / place}: {fault}")
    return findings


def iterations(root: Path) -> list[Path]:
    return [path for path in sorted(root.glob("iteration-*")) if path.is_dir() and path.name[10:].isdecimal()]


def expected_iterations(config: Config, run: Run) -> Iterator[int]:
    """Yields 0, 1, ... up to the recipe's number of iterations, or to the one at which the controller ended the run."""
    for number in range(config.iterations + 1):
        yield number
        try:
            if json.loads((run.iteration(number) / "decision" / "decision.json").read_bytes())["action"] != "continue":
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass


def check_sequence(config: Config, run: Run, findings: Findings) -> None:
    """Adds the stages to do, and a fault for each stage that is missing although a later one exists."""
    numbers = list(expected_iterations(config, run))
    places = [(number, name) for number in numbers for name in plan.stages(config, number)]
    first_stages = ("held_out", "activation_pairs", "offline_pairs", "prompts")  # of all iterations, before any other stage
    places.sort(key=lambda place: place[1] not in first_stages)
    exists = [(run.iteration(number) / name).exists() for number, name in places]
    last = max((index for index, stage_exists in enumerate(exists) if stage_exists), default=-1)
    for index, (number, name) in enumerate(places):
        if not exists[index]:
            folder = run.iteration(number).name
            findings.missing.setdefault(folder, []).append(name)
            if index < last:
                later = places[last][1]
                findings.add_fault(
                    f"{folder}/{name}", f"{run.root / folder / name}: is missing, but the later stage {later} exists"
                )


def check_folder(root: Path, folder: Path, findings: Findings) -> None:
    """Checks a committed stage: its manifest, every file in it, and that it has no other file."""
    place = folder.relative_to(root).as_posix()
    try:
        manifest = read_manifest(folder)
    except IntegrityError as error:
        findings.add_fault(place, str(error).split("; ")[0])
        return
    if manifest is None:
        findings.add_fault(place, f"{folder}: has no {MANIFEST}, and blocks the commit of its stage")
        return
    findings.committed[place] = manifest
    for fault in [*file_faults(manifest), *unlisted_files(manifest)]:
        findings.add_fault(place, fault)
    if place not in findings.faults:
        nested = [read_manifest(path.parent) for path in sorted(folder.glob(f"*/**/{MANIFEST}"))]
        findings.parts |= {part.folder.relative_to(root).as_posix(): part for part in nested if part and part.stage != "shard"}


def unlisted_files(manifest: Manifest) -> Iterator[str]:
    """Yields a fault for each file in a committed folder that its manifest does not list."""
    for path in sorted(manifest.folder.rglob("*")):
        name = path.relative_to(manifest.folder).as_posix()
        if path.is_file() and name not in manifest.files and name not in (MANIFEST, CARD):
            yield f"{path}: is not in the manifest of its folder"


def check_working_folder(root: Path, folder: Path, findings: Findings) -> None:
    """Checks the working folder of a stage: the stage will reuse what is committed in it."""
    for path in sorted(folder.rglob(MANIFEST)):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            manifest = read_manifest(path.parent, verify=True)
        except IntegrityError as error:
            findings.add_fault(path.parent.relative_to(root).as_posix(), str(error).split("; ")[0])
            continue
        if manifest and manifest.stage not in ("shard", "step"):
            findings.parts[path.parent.relative_to(root).as_posix()] = manifest


def manifests_by_input(findings: Findings) -> dict[str, Manifest]:
    """Returns manifests by their value in `inputs` of other stages: identity, or key if both stages run as one pipeline."""
    manifests = [*findings.committed.values(), *findings.parts.values()]
    return {manifest.key: manifest for manifest in manifests} | {manifest.identity: manifest for manifest in manifests}


def check_inputs(findings: Findings) -> None:
    """Adds a fault for each stage whose inputs are no longer in the run, byte for byte."""
    by_input = manifests_by_input(findings)
    for place, manifest in findings.committed.items():
        for name, value in manifest.inputs.items():
            if value not in by_input:
                fault = f"{manifest.folder}: was computed from a version of {name} ({value[:12]}) that is not in the run now"
                findings.add_fault(place, fault)


def command_of(root: Path) -> str:
    """Returns the command of the run's last start; the events of a killed run may end in half a line."""
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


def repair(root: Path, findings: Findings) -> str:
    """Returns the command that recomputes what is damaged or missing, and nothing else."""
    damaged = [shlex.quote(str(root / place)) for place in findings.faults if (root / place).exists()]
    return (f"rm -r {' '.join(damaged)} && " if damaged else "") + command_of(root)


def text(root: Path, findings: Findings) -> str:
    """Returns the findings as text."""
    files = [file for manifest in findings.committed.values() for file in manifest.files.values()]
    size = sum(file["bytes"] for file in files if isinstance(file.get("bytes"), int))
    lines = [f"run in {root}", "", f"committed: {len(findings.committed)} stages, {len(files)} files, {size / 2**20:,.1f} MiB"]
    for place, manifest in findings.committed.items():
        names = [name for name in ("num_in", "num_rows", "num_rejected") if name in manifest.stats]
        counts = ", ".join(f"{name.removeprefix('num_')} {manifest.stats[name]}" for name in names)
        lines.append(f"  {place}: {'DAMAGED' if place in findings.faults else 'ok'}" + (f" ({counts})" if counts else ""))
    for faults in findings.faults.values():
        lines += ["", *faults[:SHOWN]] + ([f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else [])
    if findings.missing:
        lines += ["", "to do:", *(f"  {name}: {', '.join(stages)}" for name, stages in findings.missing.items())]
    if findings.faults:
        lines += ["", f"repair with: {repair(root, findings)}"]
    elif findings.missing:
        lines += ["", f"no errors; continue with: {command_of(root)}"]
    else:
        lines += ["", "no errors; the run is complete"]
    return "\n".join(lines)
