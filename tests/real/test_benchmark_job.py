"""Both benchmarks end to end: real drafts by vLLM, a real OpenAI-compatible server as judge, AlpacaEval's own package."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from evolve_ray.store import rows
from tests.real.conftest import ROOT

pytestmark = pytest.mark.long

LABELS = ["[[A>>B]]", "[[A>B]]", "[[A=B]]", "[[B>A]]", "[[B>>A]]"]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PROMPTS = [f"Name {number} things that are {what}." for number in (2, 3, 5) for what in ("blue", "round", "cold", "loud")]


def make_model(folder, likely, seed):
    """A random byte-level Llama for which the tokens `likely` are more probable than others; its verdicts are noise."""
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|start|>", "<|stop|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(tokenizers.models.BPE({token: n for n, token in enumerate(special + alphabet)}, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(special)
    raw.add_tokens(LABELS)
    names = {"pad_token": "<|pad|>", "eos_token": "<|stop|>", "additional_special_tokens": ["<|start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE, **names)
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, initializer_range=0.1,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **shape)  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # one direction that every token has and no layer changes, in which the likely ones stand out
        model.model.embed_tokens.weight[:, 0] = 2.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        for token in likely:
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token), 0] += 4.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A writer, a judge, instructions with reference outputs, questions with a baseline's answers, and a recipe."""
    root = tmp_path_factory.mktemp("benchmark")
    make_model(root / "writer", [*"aeinort", "Ġ"], seed=1)
    make_model(root / "judge", ["m", "M", "<|stop|>", *LABELS], seed=2)
    said = [prompt.removeprefix("Name ").upper() * (1 + number % 3) for number, prompt in enumerate(PROMPTS)]
    outputs = [{"instruction": prompt, "output": text, "generator": "baseline", "dataset": "own"}
               for prompt, text in zip(PROMPTS, said, strict=True)]  # fmt: skip
    (root / "reference.json").write_text(json.dumps(outputs, indent=2))
    rows.write_jsonl(root / "question.jsonl", [{"uid": f"q{n}", "category": "hard_prompt", "subcategory": "own", "prompt": prompt}
                                               for n, prompt in enumerate(PROMPTS)])  # fmt: skip
    style = {"token_len": 9, "header_count": {"h1": 0}, "list_count": {"ordered": 0, "unordered": 1}, "bold_count": {"**": 0}}
    rows.write_jsonl(
        root / "baseline.jsonl",
        [{"uid": f"q{n}", "ans_id": f"a{n}", "model": "o3-mini-2025-01-31", "tstamp": 0.0, "metadata": style,
          "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": text}}]}
         for n, (prompt, text) in enumerate(zip(PROMPTS, said, strict=True))],
    )  # fmt: skip
    (root / "recipe.toml").write_text(
        f"""
        [model]
        path = "{root}/writer"
        context_tokens = 1024
        [prompts]
        path = "{root}/question.jsonl"
        [sampling]
        max_tokens = 24
        [scorer]
        name = "tests.fakes:LongerIsBetter"
        cpus_per_actor = 0.1
        [evaluation]
        prompt_column = "instruction"
        rounds = 3
        [evaluation.splits]
        alpaca = "{root}/reference.json"
        [engine]
        cpus_per_actor = 0.5
        [engine.args]
        enforce_eager = true
        enable_chunked_prefill = false
        max_num_batched_tokens = 1024
        gpu_memory_utilization = 0.05
        kv_cache_memory_bytes = 134217728
        [engine.env]
        VLLM_CPU_OMP_THREADS_BIND = "nobind"
        OMP_NUM_THREADS = "1"
        HF_HUB_OFFLINE = "1"
        [ray]
        dashboard = false
        """
    )
    return root


def call(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def evaluation(root):
    """Three rounds of the writer on AlpacaEval's JSON list."""
    call("jobs/evaluate.py", root / "writer", "--recipe", root / "recipe.toml", "--probes", "none", "--out", root / "evaluation")
    return root / "evaluation"


@pytest.fixture(scope="module")
def url(root, evaluation):
    """vLLM's own server with the judge; it starts when the drafts are there, so that engines do not share the cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", root / "judge", "--served-model-name",
               "tiny/judge", "--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager",
               "--no-enable-chunked-prefill", "--max-model-len", 4096, "--max-num-batched-tokens", 4096,
               "--gpu-memory-utilization", 0.05, "--kv-cache-memory-bytes", 1 << 27]  # fmt: skip
    with open(root / "server.log", "wb") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/v1", root, server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def wait_for(url, root, server):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError((root / "server.log").read_text()[-4000:])


def test_alpaca_eval_judges_every_round_by_its_own_code(root, url, evaluation):
    command = ["jobs/benchmark.py", "alpaca_eval", evaluation, "--reference", root / "reference.json", "--judge", "tiny/judge",
               "--judge-url", url, "--length-control", "minimal", "--top-logprobs", "20", "--out", root / "alpaca"]  # fmt: skip
    said = call(*command)
    found = json.loads((root / "alpaca" / "benchmark.json").read_text())["results"]
    assert [row["name"] for row in found] == ["writer-y1", "writer-y2", "writer-y3"]
    for row in found:
        assert row["n"] + row["num_unparsable"] == len(PROMPTS)
        assert row["n"] >= 6, "m and M are among the judge's most probable tokens"
        verdicts = json.loads((root / "alpaca" / "results" / row["name"] / "annotations.json").read_text())
        worth = [verdict["preference"] - 1 for verdict in verdicts if verdict["preference"] is not None]
        assert row["win_rate"] == pytest.approx(100 * sum(worth) / len(worth))
        assert len(set(worth)) > 1
        assert 0 < row["length_controlled_win_rate"] < 100
        assert f"{row['win_rate']:.1f}" in said
    cached = next((root / "alpaca" / "annotators").glob("*/annotations_*.json"))
    before = cached.read_bytes()
    call(*command[:-1], root / "alpaca", "--judge-url", "http://127.0.0.1:9/v1")
    assert cached.read_bytes() == before, "what is judged is not asked again: nobody answers there"


def test_arena_hard_plays_two_games_a_question(root, url, evaluation):
    command = ["jobs/benchmark.py", "arena_hard", evaluation, "--reference", root / "baseline.jsonl", "--questions",
               root / "question.jsonl", "--judge", "tiny/judge", "--max-tokens", "8", "--temperature", "1", "--out",
               root / "arena"]  # fmt: skip
    said = call(*command, "--judge-url", url)
    found = json.loads((root / "arena" / "benchmark.json").read_text())["results"]
    assert [row["name"] for row in found] == ["writer-y1", "writer-y2", "writer-y3"]
    assert all(row["n"] + row["num_unparsable"] == len(PROMPTS) for row in found)
    assert sum(row["n"] for row in found) > 0
    assert "hard_prompt" in said
    for row in found:
        judged = rows.read_jsonl(root / "arena" / "model_judgment" / "tiny-judge" / f"{row['name']}.jsonl")
        assert {one["uid"] for one in judged} == {f"q{n}" for n in range(len(PROMPTS))}
        for one in judged:
            first, second = (game["prompt"][1]["content"] for game in one["games"])
            assert first != second
    again = call(*command, "--judge-url", "http://127.0.0.1:9/v1")
    assert again[again.index("\nmodel") :] == said[said.index("\nmodel") :]
