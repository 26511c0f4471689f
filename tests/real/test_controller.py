"""Controllers end real runs: one whose scorer is hacked, and one that no longer changes."""

import json
import shutil

import pytest

from tests.real.conftest import SMALL, fork, start

pytestmark = pytest.mark.long


def report_of(run):
    return json.loads((run / "report.json").read_text())


def test_the_guard_rolls_back_a_run_whose_scorer_rewards_length(small):
    """The verifier knows the truth, the scorer counts characters; the policy learns to write on, and the run ends."""
    run = fork(small, "hacked")
    for folder in ("base_evaluation", "evaluation"):  # their reward is another one here
        shutil.rmtree(run / "iteration-00" / folder)
    (run / "config.json").unlink()
    hackable = ["scorer.name=tests.fakes:LongerIsBetter", "selection.allow_cut=true"]
    eager = ["training.learning_rate=1e-3", "training.batch_pairs=16", "training.micro_pairs=8", "training.epochs=4"]
    guard = ["controller.name=guard", "controller.min_prompts=20", "controller.split=heldout", "controller.max_length_ratio=1.15"]
    few = ["evaluation.parallel=0", "evaluation.rounds=2", "strategy.rounds=2", "probe.prompts=8"]
    command = start(run, *SMALL, *hackable, *eager, *guard, *few, "--iterations", "3")
    assert command.wait() == 0
    report = report_of(run)
    last = report["models"][-1]
    assert (last["decision"]["action"], last["rolled_back"]) == ("roll_back", True)
    assert f"roll back: {last['decision']['reason']}" in command.log.read_text()
    start_of_run, here = (model["splits"]["heldout"]["rounds"]["2"] for model in (report["models"][1], last))
    assert here["reward"]["mean"] > start_of_run["reward"]["mean"], "the scorer was not hacked: the guard fired for another cause"
    assert here["mean_response_tokens"] > start_of_run["mean_response_tokens"]
    # The run ends with the policy before, and the command says so; what was rolled back stays on disk.
    assert report["checkpoint"] == report["models"][-2]["path"] != last["path"]
    assert command.log.read_text().strip().endswith(f"checkpoint: {report['checkpoint']}")
    assert (run / f"iteration-{last['iteration']:02d}" / "checkpoint" / "model.safetensors").is_file()
    assert not (run / f"iteration-{last['iteration'] + 1:02d}" / "generations").exists()
    truth = last["drift"]["truth"]
    assert truth["labels"]["num_better"] + truth["labels"]["num_equal"] + truth["labels"]["num_worse"] > 0
    assert last["drift"]["score_tokens"]["within_prompt"] > 0.9, "the scorer does not reward length"


def test_a_plateau_ends_a_run_that_no_longer_changes(small):
    """A learning rate below float32's resolution: the weights, and with the same seeds every held-out answer, stay."""
    run = fork(small, "converged")
    (run / "config.json").unlink()
    still = ["training.learning_rate=1e-12", "training.epochs=1", "controller.name=plateau", "controller.split=heldout"]
    still += ["controller.min_prompts=20"]
    command = start(run, *SMALL, *still, "--iterations", "3")
    assert command.wait() == 0
    report = report_of(run)
    assert [model["name"] for model in report["models"]] == ["base", "activation", "iteration 1"]
    last = report["models"][-1]
    assert (last["decision"]["action"], last["rolled_back"]) == ("stop", False)
    change = last["against_previous"]["heldout"]["last"]
    assert change["mean"] == 0.0
    assert change["low"] < 0.0 < change["high"], "that none of 24 prompts changed does not show that none would"
    assert report["checkpoint"] == str(run / "iteration-01" / "checkpoint")
    assert not (run / "iteration-02" / "generations").exists()
    totals = {line["iteration"]: line for line in report["ledger"]["iterations"]}
    assert totals[1]["num_tokens"] > 0
    assert totals[1]["num_updates"] > 0
    # The same command again decides nothing anew and comes to the same end.
    again = start(run, *SMALL, *still, "--iterations", "3")
    assert again.wait(120) == 0
    assert report_of(run)["models"] == report["models"]
