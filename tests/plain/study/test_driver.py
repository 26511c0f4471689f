"""The command: recipes x seeds, iteration 0 shared, tables and claims left behind."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from evolve_ray.config.load import load
from evolve_ray.config.options import Preferences, Refresh, Training
from evolve_ray.config.resolve import resolved
from evolve_ray.inputs import context as inputs
from evolve_ray.inputs.prompts import Prompter
from evolve_ray.iterate import activate
from evolve_ray.stages.evaluation import evaluate
from evolve_ray.store import rows
from evolve_ray.store.run import Run, Stage
from evolve_ray.study import driver
from evolve_ray.study.results import Answer, Outcomes
from tests.plain.processes import ROOT, run_python
from tests.plain.study.examples import (
    ALL,
    MARKS,
    write_run,
)

TINY = ROOT / "jobs" / "recipes" / "tiny.toml"
CHECKPOINT, EVALUATIONS = {"checkpoint"}, {"base_evaluation", "evaluation"}


@pytest.fixture
def seed_folder(tmp_path):
    """The folder of seed 0 with a finished run of the tiny recipe."""
    root = tmp_path / "seed-0" / "tiny"
    write_run(root)
    (root / "config.json").write_text(json.dumps(resolved(load(TINY))))
    return root.parent


def names_in(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        ((), CHECKPOINT | EVALUATIONS),
        (("training.alpha=0.0", "training.objective=dpo"), CHECKPOINT | EVALUATIONS),
        (("strategy.name=parallel", "prompts.per_iteration=9"), CHECKPOINT | EVALUATIONS),
        (("selection.name=rule", "engine.actors=1"), CHECKPOINT | EVALUATIONS),
        (("scorer.name=reward_model", "scorer.model=toy:reward_model"), CHECKPOINT),
        (("evaluation.rounds=3",), CHECKPOINT),
        (("evaluation.parallel=7",), CHECKPOINT),
        (("strategy.name=few_shot",), set()),  # fewer evaluation prompts may fit, so fewer triples may be left out
        (("strategy.samples=9",), CHECKPOINT | EVALUATIONS),  # of the training drafts alone
        (("prompts.max_rejected_fraction=0.5",), set()),
        (("seed=1",), set()),
        (("toy.base_steps=9",), set()),
        (("activation.training.epochs=2",), set()),
        (("trainer.workers=1",), set()),
    ],
)
def test_iteration_zero_is_shared_as_far_as_it_is_alike(seed_folder, overrides, shared):
    root = seed_folder / "other"
    said = driver.share_iteration_zero(load(TINY, overrides), root)
    assert names_in(root / "iteration-00") == shared
    assert bool(said) == bool(shared)
    events = rows.read_jsonl(root / "events.jsonl") if shared else []
    assert [set(event["stages"]) for event in events] == [shared] * bool(shared)


def test_shared_files_are_the_same_files(seed_folder):
    driver.share_iteration_zero(load(TINY), seed_folder / "other")
    files = [
        path.relative_to(seed_folder / "other") for path in (seed_folder / "other" / "iteration-00").rglob("*") if path.is_file()
    ]
    assert len(files) > 10
    assert all((seed_folder / "other" / path).samefile(seed_folder / "tiny" / path) for path in files)
    assert Stage(seed_folder / "other" / "iteration-00" / "checkpoint", "checkpoint", "key of checkpoint").committed()


def test_shared_files_are_copies_where_there_are_no_hard_links(seed_folder, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no hard links here")))
    driver.share_iteration_zero(load(TINY), seed_folder / "other")
    mine, theirs = (seed_folder / name / "iteration-00" / "checkpoint" / "model.safetensors" for name in ("other", "tiny"))
    assert not mine.samefile(theirs)
    assert mine.read_bytes() == theirs.read_bytes()


def test_nothing_is_shared_into_a_run_that_has_started(seed_folder):
    (seed_folder / "other" / "iteration-00").mkdir(parents=True)
    assert driver.share_iteration_zero(load(TINY), seed_folder / "other") == ""
    assert names_in(seed_folder / "other" / "iteration-00") == set()


def test_stage_that_is_not_committed_is_not_shared(seed_folder):
    (seed_folder / "tiny" / "iteration-00" / "evaluation" / "MANIFEST.json").unlink()
    driver.share_iteration_zero(load(TINY), seed_folder / "other")
    assert names_in(seed_folder / "other" / "iteration-00") == {"checkpoint", "base_evaluation"}


def test_all_stages_come_from_one_run_the_one_that_has_most(seed_folder):
    # Two trainings need not end in the same bits: an evaluation may only go with the checkpoint that it measured.
    first = seed_folder / "an_earlier_name"
    write_run(first, marks={name: MARKS[name] for name in ("base", "activation")})
    (first / "config.json").write_bytes((seed_folder / "tiny" / "config.json").read_bytes())
    for name in EVALUATIONS:
        (first / "iteration-00" / name / "MANIFEST.json").unlink()
    driver.share_iteration_zero(load(TINY), seed_folder / "other")
    mine, theirs = (seed_folder / name / "iteration-00" / "checkpoint" / "model.safetensors" for name in ("other", "tiny"))
    assert mine.samefile(theirs)
    assert names_in(seed_folder / "other" / "iteration-00") == CHECKPOINT | EVALUATIONS


def test_sharing_that_is_interrupted_leaves_no_half_of_it(seed_folder, monkeypatch):
    root, done = seed_folder / "other", []

    def interrupted(source, target):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(os.link(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(driver, "link", interrupted)
        with pytest.raises(KeyboardInterrupt):
            driver.share_iteration_zero(load(TINY), root)
    assert not (root / "iteration-00").exists()
    driver.share_iteration_zero(load(TINY), root)
    assert names_in(root / "iteration-00") == CHECKPOINT | EVALUATIONS
    assert names_in(root) == {"iteration-00", "events.jsonl"}


def leaves(part, prefix=""):
    """Every option of a configuration by its dotted name, and the configuration with another value there."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            for name, changed in leaves(value, f"{prefix}{field.name}."):
                yield name, dataclasses.replace(part, **{field.name: changed})
        else:
            other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, str: lambda v: v + "x"}
            other |= {dict: lambda v: {**v, "x": "x"}, list: lambda v: [*v, "x"]}
            if type(value) in other:
                yield prefix + field.name, dataclasses.replace(part, **{field.name: other[type(value)](value)})


class Keys(inputs.Context):
    """A context in which every stage is committed, and which remembers their keys by folder name."""

    def stage(self, final, name, key, inputs):
        stage = super().stage(final, name, key, inputs)
        self.found[final.name] = stage.key
        summary = self.run.root / "summary.jsonl"
        stage.committed = lambda: SimpleNamespace(identity=stage.key, folder=final, path=lambda _: summary)
        return stage


def keys(config, root, monkeypatch):
    """Keys of the stages of iteration 0, made by the code that makes them in a run."""

    def made_from(*parts):
        return rows.digest([resolved(part, runtime=False) for part in parts])

    policy = inputs.Policy(Path("model"), made_from(config.toy, config.model))
    template = SimpleNamespace(hash=made_from(config.template))
    context = Keys(config, Run(root), print, print, False, template, policy)
    context.found = {}
    monkeypatch.setattr(inputs.Policy, "from_manifest", classmethod(lambda cls, manifest: cls(Path(), manifest.identity)))
    rows.write_jsonl(root / "summary.jsonl", [{}])
    prompter = Prompter(context, {})
    context.held_out = prompter.held_out()
    context.triples = {
        name: prompter.triples(name, part) for name in ("activation", "offline") if (part := getattr(config, name))
    }
    evaluate(context, 0, policy, "base", folder="base_evaluation")
    evaluate(context, 0, activate(context, policy), "activation")
    return context.found


SOLID = load(TINY, ["evaluation.parallel=4"])
REFRESHED = dataclasses.replace(SOLID, refresh=Refresh())
OFFLINE = dataclasses.replace(SOLID, offline=Preferences(path="toy:triples", training=Training(objective="dpo")))


@pytest.mark.parametrize("config", [SOLID, REFRESHED, OFFLINE], ids=["plain", "refreshed", "offline"])
def test_stages_that_are_shared_have_the_keys_that_the_driver_asks_for(config, tmp_path, monkeypatch):
    mine = keys(config, tmp_path, monkeypatch)
    assert set(mine) >= {"held_out", "base_evaluation", "activation_pairs", "checkpoint", "evaluation"}
    assert set(mine) <= {*driver.TRAINED, *driver.MEASURED}
    wrong, alike = [], 0
    others = [*leaves(config), *((str(number), other) for number, other in enumerate((SOLID, REFRESHED, OFFLINE)))]
    for name, other in others:
        theirs = keys(other, tmp_path, monkeypatch)
        shared = driver.same_stages(config, other)
        wrong += [(name, stage) for stage in shared if mine.get(stage) != theirs.get(stage)]
        alike += len(shared) == len(driver.TRAINED) + len(driver.MEASURED)
    assert wrong == []
    assert alike > 30, "the test has no case left in which stages are shared"


def test_refreshed_reward_model_shares_no_evaluation():
    # The keys would allow it today; which reward model scored what is not worth the risk.
    assert driver.same_stages(SOLID, REFRESHED) == list(driver.TRAINED)


# --- the command ----------------------------------------------------------------------------------------------------------------


class Jobs:
    """jobs/ with two tiny recipes, and a runner that writes finished runs in place of running them."""

    def __init__(self, folder):
        self.folder, self.out = folder / "jobs", folder / "out"
        (self.folder / "recipes").mkdir(parents=True)
        text = TINY.read_text()
        (self.folder / "recipes" / "tiny.toml").write_text(text)
        (self.folder / "recipes" / "tiny_iterative_dpo.toml").write_text(re.sub("alpha = .*", "alpha = 0.0", text))
        (self.folder / "recipes" / "large.toml").write_text('[model]\npath = "m"\n[prompts]\npath = "p"\n[scorer]\nmodel = "r"\n')
        self.commands, self.shared, self.fail_at = [], {}, None

    def execute(self, command):
        self.commands.append(command)
        recipe, *overrides, flag, root = command[2:]
        assert flag == "--run"
        root = Path(root)
        name = f"{root.parent.name}/{root.name}"
        if self.fail_at == name:
            return 5
        self.shared.setdefault(name, names_in(root / "iteration-00"))
        if not (root / "report.json").exists():
            write_run(root, marks={name: 13 * prompts for name, prompts in MARKS.items()})
            (root / "config.json").write_text(json.dumps(resolved(load(recipe, overrides))))
        return 0

    def main(self, *arguments):
        return driver.main([*arguments, "--out", str(self.out)], self.folder, self.execute)


@pytest.fixture
def jobs(tmp_path):
    return Jobs(tmp_path)


def test_quick_study_is_seed_0_of_evolve_and_iterative_dpo(jobs, capsys):
    assert jobs.main("--quick") == 0
    assert [Path(command[2]).stem for command in jobs.commands] == ["tiny", "tiny_iterative_dpo"]
    first = jobs.commands[0]
    assert first[0] == sys.executable
    assert Path(first[1]).resolve() == jobs.folder / "iterate.py"
    assert Path(first[2]).resolve() == jobs.folder / "recipes" / "tiny.toml"
    assert first[3:] == ["seed=0", "toy.seed=0", "--run", str(jobs.out / "seed-0" / "tiny")]
    out = capsys.readouterr().out
    assert f"== tiny, seed 0: {' '.join(first)}" in out
    assert re.search(r"^== tiny_iterative_dpo, seed 0: \d+ s$", out, re.MULTILINE)


def test_full_study_is_three_seeds_of_five_recipes():
    given = driver.parse([])
    assert (given.seeds or driver.SEEDS).split(",") == ["0", "1", "2"]
    assert driver.RECIPES.split(",") == ["tiny", "tiny_iterative_dpo", "tiny_rule", "tiny_parallel", "tiny_reward_model"]


def test_recipes_of_a_seed_share_iteration_zero(jobs, capsys):
    assert jobs.main("--recipes", "tiny,tiny_iterative_dpo", "--seeds", "0,3") == 0
    assert [command[3:5] for command in jobs.commands] == [["seed=0", "toy.seed=0"]] * 2 + [["seed=3", "toy.seed=3"]] * 2
    everything = CHECKPOINT | EVALUATIONS
    assert jobs.shared == {
        "seed-0/tiny": set(), "seed-0/tiny_iterative_dpo": everything,
        "seed-3/tiny": set(), "seed-3/tiny_iterative_dpo": everything,
    }  # fmt: skip
    assert capsys.readouterr().out.count("iteration 0 is shared:") == 2


def test_failing_run_ends_the_study_with_one_sentence_and_the_same_command_continues(jobs, capsys):
    jobs.fail_at = "seed-0/tiny_iterative_dpo"
    assert jobs.main("--quick", "--seeds", "0,1") == 2
    assert len(jobs.commands) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: tiny_iterative_dpo, seed 0: ended with exit code 5, see the lines above; continue with: ")
    assert said.endswith(f"python jobs/study.py --quick --seeds 0,1 --out {jobs.out}")
    assert not (jobs.out / "STUDY.md").exists()
    before = (jobs.out / "seed-0" / "tiny" / "report.json").stat().st_mtime_ns
    jobs.fail_at = None
    assert jobs.main("--quick", "--seeds", "0,1") == 0
    assert len(jobs.commands) == 2 + 4
    assert (jobs.out / "seed-0" / "tiny" / "report.json").stat().st_mtime_ns == before
    assert (jobs.out / "STUDY.md").exists()


def test_study_leaves_tables_claims_and_figure(jobs, capsys, tmp_path):
    claims_file = tmp_path / "deep" / "claims.json"
    assert jobs.main("--quick", "--json", str(claims_file)) == 0
    page = (jobs.out / "STUDY.md").read_text()
    assert page in capsys.readouterr().out
    assert "| tiny | base | 50.0 | 0.0 | -50.0 [-63.1, -36.9] | 0 | 26 | 52 |" in page
    assert "| 0 | tiny_iterative_dpo | iteration 1 | 25.0 | 75.0 | 50.0 [36.9, 63.1] | 26 | 0 | 52 |" in page
    for split in driver.SPLITS:
        assert f"### {split}: mean over seeds" in page
    assert "| tiny | 1 | 1 | 100.0 [20.7, 100.0] |" in page
    found = json.loads(claims_file.read_bytes())
    assert [claim["claim"] for claim in found] == list(ALL)
    assert found[0]["command"] == f"python jobs/study.py --quick --json {claims_file} --out {jobs.out}"
    assert (found[0]["reached"], found[-1]["reached"], found[-1]["note"]) == (True, None, "not run")
    assert not (jobs.out / "study.json").exists()
    drawn = (jobs.out / "study.svg").read_text()
    for text in ("EVOLVE", "iterative DPO", "activation", "iteration 1", "y1", "exact match, %"):
        assert re.search(f">{text}</text>", drawn), f"{text} is not in the figure as text"


def test_same_runs_give_the_same_files(jobs):
    jobs.main("--quick")
    names = ("STUDY.md", "study.json", "study.svg")
    before = [(jobs.out / name).read_bytes() for name in names]
    assert jobs.main("--quick") == 0
    assert [(jobs.out / name).read_bytes() for name in names] == before


def test_compute_counts_shared_stages_once(jobs):
    jobs.main("--quick")
    page = (jobs.out / "STUDY.md").read_text().split("## Compute")[1]
    lines = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in page.splitlines() if line.startswith("|")
    }
    assert lines["recipe"] == ["iteration 0 s", "evaluation s", "all s", "tokens of drafts", "tokens of evaluation"]
    assert lines["tiny"] == ["4", "2", "6", "0", "100"]
    assert lines["tiny_iterative_dpo"] == ["0", "2", "2", "0", "100"]


def test_only_report_runs_nothing_and_leaves_unfinished_runs_out(jobs, capsys):
    assert jobs.main("--quick") == 0
    Run(jobs.out / "seed-0" / "tiny_iterative_dpo").event("driver_start")
    jobs.commands.clear()
    assert jobs.main("--quick", "--only-report") == 0
    assert jobs.commands == []
    assert "seed-0/tiny_iterative_dpo: is not finished, so it is left out" in capsys.readouterr().out
    found = {claim["claim"]: claim["reached"] for claim in json.loads((jobs.out / "study.json").read_bytes())}
    assert found["d"] is None
    assert found["a"] is True


def test_report_on_no_finished_run_is_refused(jobs, capsys):
    write_run(jobs.out / "seed-0" / "tiny", end="driver_failed")
    assert jobs.main("--quick", "--only-report") == 2
    assert "has no finished run of these recipes and seeds; remove --only-report to run them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipes", "tiny,tiny_iterative_dop"), r"has no recipe 'tiny_iterative_dop'; the nearest is 'tiny_iterative_dpo'$"),
        (
            ("--recipes", "large"),
            r"large.toml: has no \[toy\], \[activation\], \[verifier\], evaluation.splits.heldout, .*remove it from",
        ),
        (("--seeds", "0,one"), r"--seeds 0,one: must be whole numbers from 0"),
        (("--seeds", "-1"), r"--seeds -1: must be whole numbers from 0"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_runs(jobs, capsys, arguments, message):
    arguments = (arguments[0] + "=" + arguments[1],)
    assert jobs.main(*arguments) == 2
    assert re.search(message, capsys.readouterr().err.strip())
    assert jobs.commands == []


def test_unreached_claims_are_no_error_of_the_command(jobs):
    assert jobs.main("--quick") == 0
    found = {claim["claim"]: claim["reached"] for claim in json.loads((jobs.out / "study.json").read_bytes())}
    assert found["b"] is False  # one iteration cannot be two


def test_runner_gives_the_exit_code_and_the_output_of_the_command(capfd):
    assert driver.execute_command([sys.executable, "-c", "print('streamed'); raise SystemExit(3)"]) == 3
    assert capfd.readouterr().out == "streamed\n"


def test_interrupt_waits_for_the_run_to_end(jobs, capsys, monkeypatch):
    waits = []

    class Process:
        def __init__(self, command):
            pass

        def wait(self):
            waits.append("wait")
            if len(waits) == 1:
                raise KeyboardInterrupt
            return 130

    monkeypatch.setattr(driver.subprocess, "Popen", Process)
    assert driver.main(["--quick", "--out", str(jobs.out)], jobs.folder) == 130
    assert len(waits) == 2
    assert "interrupted; committed work is kept; continue with: python jobs/study.py --quick" in capsys.readouterr().err


def test_study_imports_nothing_heavy_before_it_needs_it():
    heavy = "('ray', 'torch', 'vllm', 'deepspeed', 'transformers', 'datasets', 'matplotlib')"
    code = f"import sys, evolve_ray.study; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code) == "[]\n"


def test_reward_model_picks_what_it_likes_best_and_may_be_wrong():
    chain = {"p": [Answer(True, 1, 0.2), Answer(False, 1, 0.9)], "q": [Answer(False, 1, 0.1), Answer(True, 1, 0.1)]}
    samples = {"p": [Answer(True, 1, 0.5), Answer(False, 1, 0.4)], "q": [Answer(True, 1, 0.3), Answer(False, 1, None)]}
    part = Outcomes(chain, samples)
    assert part.picked("chain") == {"p": 0.0, "q": 0.0}  # of equal ones the first
    assert part.picked("parallel") == {"p": 1.0}  # q was not judged whole
    assert part.best("chain") == {"p": 1.0, "q": 1.0}
