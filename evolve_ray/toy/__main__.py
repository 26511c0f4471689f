"""Makes one part of the tiny world in a process of its own: `python -m evolve_ray.toy PART FOLDER JSON`."""

import json
import sys
from pathlib import Path

from transformers.utils import logging

from evolve_ray.store.rows import write_jsonl
from evolve_ray.toy import task


def make_world(out: Path, toy: dict) -> None:
    """Writes the prompts of every split, the preference triples, and the base model."""
    from evolve_ray.toy.world import build_base

    splits = {"train": "num_train", "heldout": "num_heldout", "long": "num_out_of_domain", "desc": "num_out_of_domain"}
    for split, count in splits.items():
        write_jsonl(out / f"{split}.jsonl", task.make_prompts(split, toy[count], toy["seed"]))
    write_jsonl(out / "triples.jsonl", task.make_triples(toy["num_triples"], toy["seed"], **task.TRIPLES))
    shape = {name: toy[name] for name in ("seed", "hidden", "layers", "heads")}
    build_base(out / "base", **shape, steps=toy["base_steps"], progress=say)


def make_judging_base(out: Path, toy: dict) -> None:
    """Teaches the base model to judge answers."""
    from evolve_ray.toy.world import build_judging_base

    build_judging_base(out / "judging_base", Path(toy["base"]), seed=toy["seed"], progress=say)


def make_judgements(out: Path, toy: dict) -> None:
    """Writes triples of which half teach to judge answers."""
    write_jsonl(out / "judgements.jsonl", task.make_judgements(toy["num_triples"], toy["seed"]))


def make_reward_model(out: Path, toy: dict) -> None:
    """Trains a sequence classifier from the base model."""
    from evolve_ray.toy.world import build_reward_model

    build_reward_model(out / "reward_model", Path(toy["base"]), seed=toy["seed"], steps=toy["reward_model_steps"], progress=say)


def say(*parts: object) -> None:
    print("  tiny world:", *parts, flush=True)


if __name__ == "__main__":
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # else transformers warns that the classifier head is new
    part, folder, options = sys.argv[1:]
    parts = {"world": make_world, "reward_model": make_reward_model, "judgements": make_judgements,
             "judging_base": make_judging_base}  # fmt: skip
    parts[part](Path(folder), json.loads(options))
