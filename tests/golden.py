"""A short run by two revisions of the code on this machine, compared byte by byte: `make golden [REV=main~1]`.

Both revisions make their own tiny world and run the same small recipe with the packages that are installed here. What must not
change are prompts, drafts, scores, pairs, reference log-probabilities, losses, weights and the stage keys; each file is listed
with both hashes, and what differs is named. A change that is meant to alter results shows here which ones.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "toy.base_steps=60", "toy.num_train=300", "toy.num_heldout=24", "toy.num_out_of_domain=8", "toy.num_triples=192",
    "toy.reward_model_steps=10", "prompts.per_iteration=64", "engine.shard_prompts=16", "engine.actors=1", "ray.dashboard=false",
]  # fmt: skip
# With the iterations of each.
RECIPES = {"tiny": 2, "tiny_reward_model": 1, "tiny_iterative_dpo": 1, "tiny_parallel": 1, "tiny_rule": 1}
USUAL = ["tiny", "tiny_reward_model"]  # these two have every stage between them
STAGES = ("prompts", "generations", "labels", "reward_pairs", "reward_model", "scores", "pairs", "reference", "checkpoint")
# Files whose bytes hold no result: prose, and seconds.
NO_RESULT = ("README.md", "MANIFEST.json")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="golden", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revision", help="the revision to compare the working tree with, for example main~1")
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=USUAL, help=f"recipes to run (default: {' '.join(USUAL)})"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="run in this folder and leave the runs there")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        tree = place / "tree"
        subprocess.run(["git", "worktree", "add", "--force", "--detach", str(tree), args.revision], cwd=ROOT, check=True)
        try:
            different = sum(compare(name, tree, place) for name in args.recipes)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    print(f"\n{different} differ" if different else "\nall files and stage keys are the same")
    return 1 if different else 0


def compare(recipe: str, tree: Path, place: Path) -> int:
    """Runs one recipe by both revisions, prints every file with its hashes, and returns how many differ."""
    runs = []
    for name, code in (("before", tree), ("after", ROOT)):
        run = place / "run" / recipe  # the same path for both: tables name the files that their rows came from
        for folder in (place / "run", place / name / recipe):
            shutil.rmtree(folder, ignore_errors=True)
        command = ["jobs/iterate.py", f"jobs/recipes/{recipe}.toml", "--run", str(run), f"iterations={RECIPES[recipe]}", *SMALL]
        subprocess.run([sys.executable, *command], cwd=code, check=True, stdout=sys.stderr)
        runs.append(results(run))
        (place / name).mkdir(exist_ok=True)
        (place / "run").rename(place / name / recipe)
    before, after = runs
    print(f"\n{recipe}")
    different = 0
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, "missing"), after.get(name, "missing")
        different += old != new
        print(f"  {'same     ' if old == new else 'DIFFERENT'}  {old[:12]:12}  {new[:12]:12}  {name}")
    return different


def results(run: Path) -> dict[str, str]:
    """sha256 of every file of the stages that hold results, and the key of every stage, by their names."""
    found = {}
    for folder in sorted(run.glob("iteration-*/*")):
        manifest = folder / "MANIFEST.json"
        if not manifest.exists() or folder.name.startswith("."):
            continue
        found[f"{folder.relative_to(run)} (stage key)"] = json.loads(manifest.read_bytes())["key"]
        if folder.name in STAGES:
            for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NO_RESULT):
                found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
