"""What every family's checkpoint says is what vLLM and transformers read in it."""

import json
import os
import subprocess
import sys

import pytest

from evolve_ray.generate.vllm import ENGINE_ENV
from tests.real.conftest import ROOT
from tests.tensors import zoo
from tests.tensors.one_rank import process_group, train

__all__ = ["process_group"]

# vLLM's CPU kernel for latent attention is coarser than float32 (0.1 nats here), so greedy tokens may differ.
COARSE_ON_CPU = {"deepseek_v3"}
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

folder, prompts = sys.argv[1], [[1, 10, 20, 30, 2], [1, 40, 41, 42, 43, 2]]
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
greedy = []
for prompt in prompts:
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    greedy.append(ids[len(prompt):])

from vllm import LLM, SamplingParams  # after transformers: vLLM changes classes of transformers

llm = LLM(model=folder, dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=True, block_size=32,
          gpu_memory_utilization=0.05, kv_cache_memory_bytes=1 << 26)
sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
print(json.dumps([greedy, [list(output.outputs[0].token_ids) for output in outputs]]))
"""


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(zoo.FAMILIES))
def test_vllm_and_transformers_continue_an_exported_checkpoint_with_equal_tokens(name, tmp_path, monkeypatch, process_group):
    checkpoint = train(zoo.save(name, tmp_path / "model"), tmp_path / "out", monkeypatch)["checkpoint"]
    environment = {**os.environ, **ENGINE_ENV}
    command = [sys.executable, "-c", SCRIPT, str(checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    assert result.stdout.strip(), result.stderr[-3000:]
    expected, generated = json.loads(result.stdout.strip().splitlines()[-1])
    assert [len(tokens) for tokens in generated] == [12, 12]
    if name not in COARSE_ON_CPU:
        assert generated == expected
