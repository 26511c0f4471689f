"""Finds the parts of the tiny world for a run, or makes them in a process of their own; they are kept beside the run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from evolve_ray.config.options import Config
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import ResourceError, UserError
from evolve_ray.models import folders
from evolve_ray.pools.session import THREADS_ENV
from evolve_ray.score.combined import reward_model_names
from evolve_ray.store import rows
from evolve_ray.store.run import Run, Stage

VERSION = 2


def toy_parts(config: Config, run: Run, say: Callable[[str], None]) -> dict[str, str]:
    """`{"toy:NAME": path}` of the parts that the recipe needs; raises `UserError` for a part that does not exist.

    A part is made once and kept beside the run, in a folder whose name holds a hash of its options.
    """
    assert config.toy is not None
    world = resolved(config.toy)
    steps = world.pop("reward_model_steps")
    folder = make_toy(run, "world", world, say)
    parts = {f"toy:{name}": str(folder / f"{name}.jsonl") for name in ("train", "heldout", "long", "desc", "triples")}
    parts["toy:base"] = str(folder / "base")
    if "toy:reward_model" in reward_model_names(config.scorer):
        options = {**world, "reward_model_steps": steps, "base": parts["toy:base"]}
        key = {**options, "base": folders.content_hash(folder / "base")}
        parts["toy:reward_model"] = str(make_toy(run, "reward_model", options, say, key) / "reward_model")
    names = [config.model.path, config.prompts.path, *config.evaluation.splits.values(), *reward_model_names(config.scorer)]
    names += [part.path for part in (config.activation, config.offline, *config.models.values()) if part]
    if "toy:judging_base" in names:
        options = {"seed": world["seed"], "base": parts["toy:base"]}
        key = {**options, "base": folders.content_hash(folder / "base")}
        parts["toy:judging_base"] = str(make_toy(run, "judging_base", options, say, key) / "judging_base")
    if "toy:judgements" in names:
        options = {name: world[name] for name in ("seed", "num_triples")}
        parts["toy:judgements"] = str(make_toy(run, "judgements", options, say) / "judgements.jsonl")
    for name in names:
        if name.startswith("toy:") and name not in parts:
            raise UserError(f"{name}: the tiny world has no such part; it has {', '.join(sorted(parts))}")
    return parts


def make_toy(run: Run, part: str, options: dict, say: Callable[[str], None], key: dict | None = None) -> Path:
    """One committed folder of the tiny world; made in a process of its own if it is missing."""
    digest = rows.digest(["toy", VERSION, part, key or options])
    stage = Stage(run.root.parent / f"toy-{part.replace('_', '-')}-{digest[:12]}", f"toy {part}", digest)
    stage.work = stage.work.with_name(f"{stage.work.name}-{os.getpid()}")  # two runs may make the same world at the same time
    manifest = stage.committed()
    if manifest is None:
        say(f"  tiny world: making its {part.replace('_', ' ')} (kept at {stage.final})")
        source_root = str(Path(__file__).parents[2])
        environment = {
            **THREADS_ENV,
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, [source_root, os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, "-m", "evolve_ray.toy", part, str(stage.start()), json.dumps(options)]
        result = subprocess.run(command, env=environment)
        if result.returncode:
            raise ResourceError(
                f"tiny world: making its {part.replace('_', ' ')} failed with exit code {result.returncode}; see the lines above"
            )
        manifest = stage.commit()
    return manifest.folder
