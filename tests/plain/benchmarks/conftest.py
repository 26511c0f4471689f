"""A judge that answers on this machine, and what it judges."""

import json

import pytest

from evolve_ray.store import rows
from tests.plain.benchmarks.examples import PROMPTS, FakeJudge, write_evaluation


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr("evolve_ray.benchmarks.judge.RETRIES", 0)
    monkeypatch.setattr("evolve_ray.benchmarks.alpaca.RETRIES", 0)
    fake = FakeJudge()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def place(tmp_path):
    """An evaluation, its questions, the baseline's answers and the reference outputs."""
    write_evaluation(tmp_path / "evaluation", lambda prompt, number: f"{prompt}: round {number}" + "!" * int(prompt[-1]) * number)
    rows.write_jsonl(tmp_path / "question.jsonl", [
        {"uid": f"u{n}", "category": "hard_prompt" if n < 4 else "creative_writing", "subcategory": "s", "prompt": prompt}
        for n, prompt in enumerate(PROMPTS)])  # fmt: skip
    rows.write_jsonl(tmp_path / "baseline.jsonl", [
        {"uid": f"u{n}", "ans_id": "a", "model": "base", "tstamp": 0.0, "metadata": {},
         "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": f"baseline on {prompt}"}}]}
        for n, prompt in enumerate(PROMPTS)])  # fmt: skip
    outputs = [{"instruction": prompt, "output": "b" * (1 + 3 * n % 5), "generator": "reference", "dataset": "own"}
               for n, prompt in enumerate(PROMPTS)]  # fmt: skip
    (tmp_path / "reference.json").write_text(json.dumps(outputs, indent=2))
    return tmp_path
