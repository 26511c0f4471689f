"""What a fault must leave as it is, and what a run that met one must share with its undisturbed twin."""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from evolve_ray.audit import verify
from evolve_ray.store import rows
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import CARD, MANIFEST, read_manifest

Kept = dict[Path, tuple[int, str]]  # file -> time, sha256


def committed_files(run: Path) -> Kept:
    """Every file of every committed folder with its time and hash: none of them may ever change."""
    found: Kept = {}
    for path in run.rglob(MANIFEST):
        if path.parent.name.startswith("."):
            continue  # not renamed yet
        with contextlib.suppress(FileNotFoundError):  # what a dying worker still moves
            names = [MANIFEST, *(name for name in json.loads(path.read_bytes())["files"] if name != CARD)]
            files = [path.parent / name for name in names]
            found |= {file: (file.stat().st_mtime_ns, sha256_file(file)) for file in files}
    return found


def places(path: Path) -> Iterator[Path]:
    """Where a file may stand now: `.STAGE-KEY` becomes `STAGE` when the stage is committed."""
    parts = [(part, found[1]) if (found := re.fullmatch(r"\.(\w+)-[0-9a-f]{12}", part)) else (part,) for part in path.parts]
    return (Path(*chosen) for chosen in itertools.product(*parts))


def is_past(path: Path) -> bool:
    """Whether a file belongs to a stored training step that a later one, or the end of its training, has replaced."""
    folder = next((parent for parent in path.parents if re.fullmatch(r"step-\d+", parent.name)), None)
    if folder is None:
        return False
    training = next(parent for parent in folder.parents if parent.name.startswith("."))
    later = any(other.parent.name > folder.name for other in folder.parent.glob(f"step-*/{MANIFEST}"))
    return later or any((place / MANIFEST).exists() for place in places(training))


def assert_kept(before: Kept) -> None:
    """What was committed before the fault is untouched, or moved whole into its finished stage."""
    assert before, "nothing was committed before the fault"
    for path, known in before.items():
        there = next((place for place in places(path) if place.exists()), None)
        assert there or is_past(path), f"{path} is gone"
        if there:
            assert (there.stat().st_mtime_ns, sha256_file(there)) == known, f"{there} was written again"


def stage_identity(folder: Path) -> str:
    manifest = read_manifest(folder, verify=True)
    assert manifest is not None, f"{folder} is not committed"
    return manifest.identity


def assert_equals_twin(run: Path, twin: Path, iteration: int = 1) -> None:
    """Rows, pairs, references, losses, weights and the whole evaluation are the undisturbed run's, and the run is sound."""
    ours, theirs = (folder / f"iteration-{iteration:02d}" for folder in (run, twin))
    assert (ours / "pairs/pairs.parquet").read_bytes() == (theirs / "pairs/pairs.parquet").read_bytes()
    stages = ["prompts", "generations", "scores", "pairs", "reference"]
    for stage in stages:
        assert stage_identity(ours / stage) == stage_identity(theirs / stage), stage
    losses = [[row["loss"] for row in rows.read_jsonl(folder / "checkpoint/training_log.jsonl")] for folder in (ours, theirs)]
    assert losses[0] == losses[1]
    assert sha256_file(ours / "checkpoint/model.safetensors") == sha256_file(theirs / "checkpoint/model.safetensors")
    assert_equal_evaluation(ours / "evaluation", theirs / "evaluation")
    found = verify.verify(run)
    assert found.faults == {}
    assert found.missing == {}


def assert_equal_evaluation(ours: Path, theirs: Path) -> None:
    """All its parts, then the whole."""
    parts = [path.parent.relative_to(theirs) for path in theirs.rglob(MANIFEST) if not path.parent.name.startswith("shard-")]
    assert {str(part) for part in parts} >= {"generations", "scores", "parallel/generations", "parallel/scores"}
    for part in sorted(parts, reverse=True):  # the whole is "."
        assert stage_identity(ours / part) == stage_identity(theirs / part), f"evaluation/{part}"
