"""Guessing a refinement from the draft in its prompt: the same greedy chains in fewer steps, through a real vLLM."""

import json
import subprocess
import sys

import pytest

from tests.real.conftest import ROOT

pytestmark = pytest.mark.long

CHAINS = """
import json, os, sys
from pathlib import Path
from evolve_ray.config.load import load
from evolve_ray.store import rows
from evolve_ray.models.chat import Chat
from evolve_ray.generate.drive import Drive
from evolve_ray.generate.spec import GenerateSpec
from evolve_ray.generate.vllm import ENGINE_ENV, VllmEngine
from evolve_ray.refine.template import load_template
from evolve_ray.refine.strategies import chain

if __name__ == "__main__":
    recipe = load(Path(sys.argv[1]), sys.argv[4:])
    os.environ.update(ENGINE_ENV | {name: str(value) for name, value in recipe.engine.env.items()})
    template, chat = load_template(recipe.template.name, recipe.template.layout), Chat(sys.argv[2])
    spec = GenerateSpec(
        prompts="", work="", key="", shard_prompts=64, model=sys.argv[2], model_hash="", dtype="float32", context_tokens=128,
        template=template, strategy=recipe.strategy, sampling=recipe.sampling, engine=recipe.engine, seed=0, scope=1,
    )
    engine = VllmEngine(spec, chat)
    drive = Drive(engine, lambda ask: chat.context_ids(ask.messages), spec)
    made, _, stats = drive.run(rows.read_table(Path(sys.argv[3])), lambda prompt: chain(prompt, template, recipe.strategy))
    print("found", json.dumps({"texts": [row["text"] for row in made], **stats, **engine.counts()}))
"""
NGRAM = 'engine.args.speculative_config={method = "ngram", num_speculative_tokens = 4, prompt_lookup_max = 3}'


def chains(small, *overrides):
    """Greedy chains of the small run's model on its prompts, and the engine's counts."""
    model, prompts = small.run / "iteration-01/checkpoint", small.run / "iteration-01/prompts/prompts.parquet"
    greedy = ["sampling.temperature=0", "evaluation.temperature=0"]
    command = [sys.executable, "-c", CHAINS, str(ROOT / "jobs/recipes/tiny.toml"), str(model), str(prompts), *greedy, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found ")).removeprefix("found "))


def test_guessed_tokens_change_no_greedy_text_and_save_steps(small):
    plain, guessing = chains(small), chains(small, NGRAM)
    assert guessing["texts"] == plain["texts"]
    assert guessing["num_tokens"] == plain["num_tokens"]
    assert 0 < guessing["num_accepted_tokens"] <= guessing["num_guessed_tokens"]
    assert guessing["num_steps"] < plain["num_steps"]
    print({name: (plain.get(name), guessing[name]) for name in guessing if name.startswith("num_")})
