"""What a command refuses before an engine starts: damaged files of a real run, models with code, a run that somebody holds."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evolve_ray.store import rows
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import read_manifest
from tests.faults.harness import arguments, ended, finish, last_line
from tests.faults.twin import assert_equals_twin
from tests.real.conftest import SMALL, start


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def edit_a_row(path: Path) -> None:
    table = rows.read_table(path)
    table[0]["score"] = 1.0 - table[0]["score"]
    rows.write_table(path, table, rows.SCORE)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a flipped bit in the pairs": ("pairs/pairs.parquet", flip),
    "a truncated shard of generations": ("generations/shard-00001/rows.parquet", truncate),
    "a flipped bit in the weights": ("checkpoint/model.safetensors", flip),
    "a score edited by hand": ("scores/shard-00000/rows.parquet", edit_a_row),
    "a deleted file of the evaluation": ("evaluation/summary.jsonl", Path.unlink),
}


def copy_of(small, name: str) -> Path:
    run = small.run.with_name(name)
    shutil.copytree(small.run, run, copy_function=shutil.copy2)
    (run / "events.jsonl").unlink()
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_a_real_run_is_refused_with_both_hashes_and_its_repair_makes_the_same_bytes(small, damage):
    run = copy_of(small, f"damaged-{list(DAMAGES).index(damage)}")
    name, make = DAMAGES[damage]
    path = run / "iteration-01" / name
    folder = run / "iteration-01" / name.split("/")[0]
    expected = read_manifest(folder).files[path.relative_to(folder).as_posix()]["sha256"]
    make(path)
    actual = sha256_file(path) if path.exists() else "missing"
    assert actual != expected, "nothing was damaged"
    with ended(start(run, *arguments())) as command:
        assert command.wait(200) == 4
    assert last_line(command) == (
        f"error: {path}: sha256 is {actual}, but its manifest says {expected}; delete {folder} and submit the same command again "
        "to rebuild it"
    )
    assert not [event for event in rows.read_jsonl(run / "events.jsonl") if event["event"] == "stage_start"], "a stage ran"
    if name.startswith("pairs"):
        shutil.rmtree(folder)
        finish(run)
        assert_equals_twin(run, small.run)


class Canary:
    """Its unpickling makes a folder."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("kind", ["pickle", "code"])
def test_a_model_with_pickled_weights_or_with_code_is_refused_and_its_canary_never_runs(small, place, tmp_path, kind):
    folder, canary, run = tmp_path / "model", tmp_path / "canary", small.run.with_name(f"evil-{kind}")
    shutil.copytree(next(place.glob("toy-world-*")) / "base", folder)
    if kind == "pickle":
        for weights in folder.glob("*.safetensors*"):
            weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    else:
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    with ended(start(run, *SMALL, f"model.path={folder}", "--iterations", "1")) as command:
        assert command.wait(200) == 2
    said = last_line(command)
    assert said.startswith(f"error: model.path: {folder}: "), said
    assert ("has no *.safetensors" if kind == "pickle" else "auto_map in config.json") in said
    assert not canary.exists()
    if kind == "pickle":  # the canary itself works
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
        assert canary.exists()
