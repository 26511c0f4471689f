"""A code task through the real command: programs against tests, and refinement with the failed test in view."""

import json
import random

import pytest

from evolve_ray.refine.template import load_template
from evolve_ray.store import rows
from tests import templates
from tests.plain.conftest import make_bpe
from tests.real.conftest import start

pytestmark = pytest.mark.long

FAILED = (
    'Traceback (most recent call last):\n  File "program.py", line {line}, in <module>\n    {test}\n           {mark}\n'
    "AssertionError: {got}"
)  # what the verifier says about a wrong program


def task(times, plus):
    """(prompt, right program, tests) for one function."""
    tests = [f"assert f({x}) == {x * times + plus}, f({x})" for x in (2, 5)]
    return f"times {times} plus {plus}", program(times, plus), "\n".join(tests)


def program(times, plus):
    return f"f = lambda x: x*{times} + {plus}"


def words(times, plus, wrong):
    """What the verifier says about a program that computes something else."""
    tests = task(times, plus)[2].splitlines()
    number = next(n for n, x in enumerate((2, 5)) if x * wrong[0] + wrong[1] != x * times + plus)
    x = (2, 5)[number]
    mark = "^" * (len(tests[number].split(",")[0]) - len("assert "))
    return FAILED.format(line=3 + number, test=tests[number], mark=mark, got=x * wrong[0] + wrong[1])


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    """A tiny Qwen3 that writes programs, a third of them wrong, and has seen some failed tests before a right one."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from evolve_ray.toy.world import fit

    folder = tmp_path_factory.mktemp("coder")
    tokenizer = make_bpe(["<|im_start|>", "<|im_end|>"], templates.PLAIN, eos_token="<|im_end|>", pad_token="<|im_end|>")
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id))
    template, rng = load_template("tiny", "conversation"), random.Random(0)

    def draw(refined):
        times, plus = rng.randint(2, 9), rng.randint(1, 9)
        wrong = (times, plus % 9 + 1)
        prompt, right, _ = task(times, plus)
        messages = template.direct(prompt)
        if refined:
            messages = template.after_feedback(prompt, program(*wrong), words(times, plus, wrong))
        answer = right if refined or rng.random() < 0.67 else program(*wrong)
        return tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)

    def loss_of(step):
        batch = tokenizer([draw(step % 3 == 0) for _ in range(16)], return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss

    fit(model, loss_of, steps=600, learning_rate=3e-3, progress=print)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_programs_are_refined_with_the_failed_test_in_view_and_trained(coder, tmp_path):
    tasks = [task(times, plus) for times in range(2, 10) for plus in range(1, 10)]
    random.Random(1).shuffle(tasks)
    named = [{"prompt": prompt, "answer": tests} for prompt, _, tests in tasks]
    rows.write_jsonl(tmp_path / "prompts.jsonl", named[:60])
    rows.write_jsonl(tmp_path / "held.jsonl", named[60:])
    run = tmp_path / "run"
    overrides = [
        f"model.path={coder}", "model.context_tokens=512", f"prompts.path={tmp_path}/prompts.jsonl", "prompts.per_iteration=60",
        "toy=none", "activation=none", "verifier.name=tests", "strategy.name=feedback", "strategy.rounds=3",
        "sampling.max_tokens=32", f'evaluation.splits={{held="{tmp_path}/held.jsonl"}}', "evaluation.pick=last",
        "evaluation.rounds=2", "engine.actors=1", "ray.dashboard=false",
    ]  # fmt: skip
    assert start(run, *overrides, "--iterations", "1").wait() == 0

    here = run / "iteration-01"
    stored = [row for file in here.glob("generations/*/rows.parquet") for row in rows.read_table(file)]
    drafts = [row for row in stored if row["kind"] == "answer"]
    verdicts = {row["draft_id"]: row["score"] for file in here.glob("scores/*/rows.parquet") for row in rows.read_table(file)}
    first = {row["draft_id"]: row for row in drafts if row["round"] == 1}
    second = [row for row in drafts if row["round"] == 2]
    assert len(first) == 60
    assert 0 < len(second) < 60, "some first programs are right, others are not"
    assert {row["parent_id"] for row in second} == {name for name in first if verdicts[name] != 1.0}
    for row in second:
        told = row["messages"][-1]["content"]
        assert told.endswith("\n\nfix")
        assert "Error" in told or "limit" in told
    right = sum(verdicts[row["draft_id"]] == 1.0 for row in second)
    assert right > len(second) / 2, "the model was taught to use what the failed test says"
    pairs = rows.read_table(here / "pairs" / "pairs.parquet")
    assert pairs
    assert all((pair["chosen_score"], pair["rejected_score"]) == (1.0, 0.0) for pair in pairs)
    log = rows.read_jsonl(here / "checkpoint" / "training_log.jsonl")
    assert log[-1]["margin"] > 0
    held = json.loads((run / "report.json").read_text())["models"][-1]["splits"]["held"]
    assert (held["strategy"]["name"], held["strategy"]["pick"], held["strategy"]["n"]) == ("feedback", "last", 12)
    assert held["strategy"]["exact_match"]["mean"] > held["rounds"]["1"]["exact_match"]["mean"]
