"""What an ask sets for itself, and the log-probability of a text, through a real vLLM."""

import json
import subprocess
import sys

import pytest

from tests.real.conftest import ROOT

ASKS = """
import json, os, sys
from pathlib import Path
from evolve_ray.config.load import load
from evolve_ray.config.options import Strategy
from evolve_ray.models.chat import Chat
from evolve_ray.generate.drive import Drive
from evolve_ray.generate.spec import GenerateSpec
from evolve_ray.generate.vllm import ENGINE_ENV, VllmEngine
from evolve_ray.refine.asks import Ask, LogProb
from evolve_ray.refine.template import load_template

MESSAGES = ({"role": "user", "content": "sort:hbcafdeg"},)

def asks(prompt):
    ask = lambda sample, **own: Ask(MESSAGES, sample, 1, temperature=0.0, **own)
    whole = yield ask(0)
    text = whole.text
    others = yield [ask(1, prefix=text[:3]), ask(2, stop=(text[4],)), ask(3, max_tokens=2), Ask(MESSAGES, 4, 1)]
    logp = yield LogProb(MESSAGES, text)
    print("found", json.dumps({"whole": text, "logp": logp, "stopped_at": [d.stopped_at for d in others], "stop": text[4]}))
    return [whole, *others]

if __name__ == "__main__":
    recipe = load(Path("jobs/recipes/tiny.toml"), [])
    os.environ.update(ENGINE_ENV | {name: str(value) for name, value in recipe.engine.env.items()})
    chat = Chat(sys.argv[1])
    spec = GenerateSpec(
        prompts="", work="", key="", shard_prompts=64, model=sys.argv[1], model_hash="", dtype="float32", context_tokens=128,
        template=load_template("tiny", "conversation"), strategy=Strategy(name="mine:asks"), sampling=recipe.sampling,
        engine=recipe.engine, seed=0, scope=1,
    )
    drive = Drive(VllmEngine(spec, chat), lambda ask: chat.context_ids(ask.messages), spec)
    drive.response_ids = lambda text, finished: chat.response_ids(text, finished=finished)
    prompt = {"prompt_id": "p", "prompt": "q", "split": "train", "file": "f", "line": 1}
    rows, rejected, stats = drive.run([prompt], asks)
    print("found", json.dumps({"rows": rows, "rejected": rejected, "stats": stats}))
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    context, response = chat.context_ids(MESSAGES), chat.response_ids(rows[0]["text"], finished=True)
    logps = model(torch.tensor([context + response])).logits[0].log_softmax(-1)
    print("found", json.dumps({"logp": sum(logps[len(context) + n - 1, token].item() for n, token in enumerate(response))}))
"""


def asks(model):
    done = subprocess.run([sys.executable, "-c", ASKS, str(model)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.removeprefix("found ")) for line in done.stdout.splitlines() if line.startswith("found ")]


def test_a_real_engine_continues_stops_and_reads_as_it_is_asked(small):
    strategy, ran, reference = asks(small.run / "iteration-01/checkpoint")
    text = strategy["whole"]
    whole, continued, stopped, short, sampled = ran["rows"]
    assert (continued["text"], continued["num_prefix_tokens"]) == (text, 3), "a greedy continuation is the greedy text"
    assert continued["num_tokens"] == whole["num_tokens"] - 3
    assert stopped["text"] == text[: text.index(strategy["stop"])]
    assert strategy["stopped_at"] == ["", strategy["stop"], "", ""]
    assert (short["text"], short["finish_reason"]) == (text[:2], "length")
    assert sampled["finish_reason"] in ("stop", "length")
    assert strategy["logp"] == pytest.approx(reference["logp"], abs=1e-3)
