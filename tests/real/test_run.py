"""What a run leaves behind: the run directory's contract, exact numbers at step 0, and a model that others load."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evolve_ray.config.load import load
from evolve_ray.generate.worker import engine_pool
from evolve_ray.report.clock import PARTS, by_driver, seconds_between, time_of
from evolve_ray.report.ledger import ledger
from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.run import Run
from tests.real.conftest import ROOT, SMALL, start


def test_the_run_directory_keeps_its_contract(small):
    names = {path.name for path in small.run.iterdir()}
    assert {"LOCK", "config.json", "events.jsonl", "report.html", "report.json", "iteration-00", "iteration-01"} <= names
    for stage in ("generations", "scores", "pairs", "reference", "checkpoint", "evaluation"):
        manifest = read_manifest(small.run / "iteration-01" / stage, verify=True)
        assert manifest is not None, stage
        assert manifest.stats["num_in"] > 0
    assert not list((small.run / "iteration-01").glob(".*")), "working folders were left behind"


def test_rows_are_conserved_from_stage_to_stage(small):
    stats = {
        name: read_manifest(small.run / "iteration-01" / name).stats for name in ("prompts", "generations", "scores", "pairs")
    }
    assert stats["generations"]["num_in"] == stats["prompts"]["num_rows"] == 64
    assert stats["generations"]["num_rows"] == 4 * 64
    assert stats["scores"]["num_rows"] + stats["scores"]["num_rejected"] == stats["generations"]["num_rows"]
    assert stats["pairs"]["num_used"] + stats["pairs"]["num_rejected"] == stats["generations"]["num_rows"]


def test_the_report_has_every_model_split_and_round_with_intervals(small):
    report = json.loads((small.run / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["base", "activation", "iteration 1"]
    for model in report["models"]:
        assert set(model["splits"]) == {"heldout", "long", "desc"}
        for split in model["splits"].values():
            assert list(split["rounds"]) == ["1", "2", "3", "4"]
            for number, figures in split["rounds"].items():
                for measure in ("reward", "exact_match"):
                    assert figures[measure]["low"] <= figures[measure]["mean"] <= figures[measure]["high"]
                if number != "1":
                    moved = figures["against_first"]
                    assert moved["improved"] + moved["degraded"] + moved["unchanged"] == figures["n"]
    assert {"checkpoint", "generations", "pairs"} <= {line["stage"] for line in report["stages"]}


def test_the_clock_of_the_ledger_sums_to_the_wall_clock_and_saw_every_part(small):
    zero, one = ledger(Run(small.run), 2)["clock"]
    wall = sum(seconds_between(time_of(part[0]), time_of(part[-1])) for part in by_driver(small.events()))
    assert zero["seconds"] + one["seconds"] == pytest.approx(wall, abs=0.1)
    assert all(row[name] > 0 for row in (zero, one) for name in ("engines", "updates", "starts", "rest"))
    assert all(sum(row[name] for name in PARTS) == pytest.approx(row["seconds"], abs=0.01) for row in (zero, one))


def test_before_the_first_update_the_dpo_loss_is_ln_2_and_every_implicit_reward_is_zero(small):
    """Through real ZeRO-3: catches masks, shifts, padding, templates, dtype and stale references at once."""
    first = rows.read_jsonl(small.run / "iteration-01" / "checkpoint" / "training_log.jsonl")[0]
    assert first["loss_dpo"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("reward_chosen", "reward_rejected", "margin", "margin_improve", "margin_keep"):
        assert abs(first[name]) < 1e-5, name
    assert first["loss_improve"] == pytest.approx(0.25, abs=1e-5)


def test_training_changed_the_weights_and_lowered_the_loss(small):
    log = rows.read_jsonl(small.run / "iteration-01" / "checkpoint" / "training_log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
    before, after = (read_manifest(small.run / f"iteration-0{number}" / "checkpoint") for number in (0, 1))
    assert before.files["model.safetensors"]["sha256"] != after.files["model.safetensors"]["sha256"]


def test_activation_and_iteration_trained_on_one_worker_group(small):
    loaded = [(event["iteration"], event["pid"]) for event in small.events() if event["event"] == "model_loaded"]
    assert {iteration for iteration, _ in loaded} == {0, 1}
    assert len({pid for _, pid in loaded}) == 1, "the process of rank 0 outlived the first training"
    assert not (small.run / ".ray-train").exists()


def test_a_second_call_recomputes_nothing_and_is_quick(small):
    before = {path: path.stat().st_mtime_ns for path in small.run.rglob("*/MANIFEST.json")}
    started = time.monotonic()
    again = start(small.run, *SMALL, "--iterations", "1")
    assert again.wait(120) == 0
    assert time.monotonic() - started < 30
    assert {path: path.stat().st_mtime_ns for path in small.run.rglob("*/MANIFEST.json")} == before
    assert "y4 - y1" in again.log.read_text()


def test_another_configuration_is_refused_by_the_name_of_the_field(small):
    other = start(small.run, *SMALL, "--iterations", "1", "training.beta=0.3")
    assert other.wait(60) == 2
    last = other.log.read_text().strip().splitlines()[-1]
    assert "training.beta (0.2 -> 0.3)" in last


def test_the_engines_log_probabilities_are_the_checkpoints_after_the_iteration(small):
    """New weights in a kept engine: neither they nor what the prefix cache holds are of the model before."""
    report = json.loads((small.run / "report.json").read_text())
    probe = report["models"][-1]["probe"]
    assert probe["num_responses"] == 64  # two engines, 16 prompts, two rounds
    assert probe["num_tokens"] > 200
    assert probe["mean_difference"] < 1e-5
    assert probe["max_difference"] < 1e-4
    assert probe["kl_iteration"] == probe["kl_initial"] > 0  # iteration 1 starts from the initial policy


def test_chain_and_parallel_samples_are_compared_at_equal_numbers(small):
    report = json.loads((small.run / "report.json").read_text())
    for model in report["models"]:
        best = model["splits"]["heldout"]["best_of"]
        assert (best["num_responses"], best["n"]) == (4, 24)
        first = model["splits"]["heldout"]["rounds"]["1"]["exact_match"]["mean"]
        assert best["chain"]["exact_match"]["mean"] >= first  # the chain's first draft is one of them
        difference = best["chain"]["exact_match"]["mean"] - best["parallel"]["exact_match"]["mean"]
        assert best["difference"]["exact_match"]["mean"] == pytest.approx(difference)


def test_the_reference_policy_is_recorded_in_manifest_and_model_card(small):
    reference = read_manifest(small.run / "iteration-01" / "reference").stats
    report = json.loads((small.run / "report.json").read_text())
    assert reference["model"] == report["models"][1]["model"]  # activation
    card = (small.run / "iteration-01/checkpoint/README.md").read_text()
    assert f"| iteration: {reference['model'][:12]} |" in card


def test_the_model_card_has_the_evaluation_that_came_after_the_training(small):
    card = (small.run / "iteration-01/checkpoint/README.md").read_text()
    report = json.loads((small.run / "report.json").read_text())
    gain = report["models"][-1]["splits"]["heldout"]["gain"]["exact_match"]
    assert f"{100 * gain['mean']:.1f} \\[{100 * gain['low']:.1f}, {100 * gain['high']:.1f}\\]" in card
    assert report["models"][-1]["model"] in card
    read_manifest(small.run / "iteration-01" / "checkpoint", verify=True)


def test_every_step_and_evaluation_is_in_tensorboard(small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(small.run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    logs = [rows.read_jsonl(small.run / f"iteration-0{number}" / "checkpoint" / "training_log.jsonl") for number in (0, 1)]
    for log, tag, before in zip(logs, ("activation", "training"), (0, len(logs[0])), strict=True):
        told = [(event.step, pytest.approx(event.value)) for event in found.Scalars(f"{tag}/loss")]
        assert [(before + entry["step"] + 1, entry["loss"]) for entry in log] == told
    report = json.loads((small.run / "report.json").read_text())
    first = [model["splits"]["heldout"]["rounds"]["1"]["exact_match"]["mean"] for model in report["models"]]
    assert [event.value for event in found.Scalars("evaluation/heldout/y1/exact_match")] == pytest.approx(first)


VLLM_AGAINST_TRANSFORMERS = """
import dataclasses, json, sys
from pathlib import Path
from evolve_ray.config.load import load
from evolve_ray.generate.spec import GenerateSpec
from evolve_ray.generate.worker import Generator
from evolve_ray.models.folders import content_hash
from evolve_ray.refine.template import load_template
from evolve_ray.train.weight_probe import Prober
recipe, before, after, prompts = sys.argv[1:]
config = load(recipe)
template = load_template("tiny", "conversation")
def spec(folder):
    return GenerateSpec(
        prompts="", work="", key="", shard_prompts=1, model=folder, model_hash=content_hash(Path(folder)),
        dtype="float32", context_tokens=128, template=template, strategy=config.strategy,
        sampling=dataclasses.replace(config.sampling, temperature=0.0), engine=config.engine, seed=0, scope=1)
texts = [json.loads(line)["prompt"] for line in open(prompts)][:20]
worker = Generator(spec(before))
def ask():
    for number, text in enumerate(texts):
        worker.engine.submit(str(number), worker.chat.context_ids(template.direct(text)), 0)
    done = {}
    while len(done) < len(texts):
        done |= {c.request_id: c.text for c in worker.engine.step()}
    return [done[str(n)] for n in range(len(texts))]
old = ask()
stale = worker.probe([{"prompt_id": str(n), "prompt": text} for n, text in enumerate(texts)])
worker.renew(spec(after))
new = ask()
fresh = worker.probe([{"prompt_id": str(n), "prompt": text} for n, text in enumerate(texts)])
plain = Prober(("cpu", "float32"))
def apart(samples):
    given = [logp for sample in samples for logp in sample["logps"]]
    own = [logp for part in plain.token_logps(after, samples) for logp in part]
    return sum(abs(a - b) for a, b in zip(given, own, strict=True)) / len(own)
import torch, transformers
def reference(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = []
    for text in texts:
        ids = torch.tensor([worker.chat.context_ids(template.direct(text))])
        made = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=worker.chat.stop_ids)[0, ids.shape[1]:]
        out.append(worker.chat.tokenizer.decode(made, skip_special_tokens=True))
    return out
result = {"old": old, "new": new, "old_reference": reference(before)}
print(json.dumps(result | {"new_reference": reference(after), "stale": apart(stale), "fresh": apart(fresh)}))
"""


def test_vllm_and_transformers_give_the_same_greedy_tokens_before_and_after_new_weights(small, place):
    world = next(place.glob("toy-world-*"))
    before, after = world / "base", small.run / "iteration-01" / "checkpoint"
    environment = {**os.environ, **engine_pool(load(ROOT / "jobs/recipes/tiny.toml").engine).env}
    command = [sys.executable, "-c", VLLM_AGAINST_TRANSFORMERS, str(ROOT / "jobs/recipes/tiny.toml")]
    command += [str(before), str(after), str(world / "heldout.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    texts = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(texts["new"]) == 20
    assert texts["old"] == texts["old_reference"]
    assert texts["new"] == texts["new_reference"]
    assert texts["old"] != texts["new"], "the new weights make no difference: the probe proves nothing"
    assert texts["fresh"] < 1e-5
    assert texts["stale"] > 1e-3, "an engine with the old weights would not be found out"


def test_the_checkpoint_loads_as_it_is_and_names_its_lineage(small):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = small.run / "iteration-01" / "checkpoint"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.get(name) for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert model.generation_config.eos_token_id is not None
    assert "evolve-ray" in Path(folder / "README.md").read_text()


def test_the_log_names_every_stage_once_and_holds_no_traceback(small):
    lines = small.log.read_text().splitlines()
    assert not [line for line in lines if "Traceback" in line or "Exception" in line]
    stages = [line for line in lines if line.startswith("  iteration ")]
    assert "  iteration 1: generations" in stages
    assert len(stages) == len(set(stages))
    assert len(lines) <= 100
