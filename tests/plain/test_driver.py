"""The command: one sentence on stderr, the documented exit code, and nothing heavy before the recipe is valid."""

import json
import os
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from evolve_ray import driver
from evolve_ray.config.load import load
from evolve_ray.driver import main, parse
from evolve_ray.errors import ResourceError, run_command
from evolve_ray.plan.plan import check_space
from evolve_ray.pools.session import join_ray
from evolve_ray.store.places import run_folder
from evolve_ray.store.run import Run
from evolve_ray.watch.terminal import print_stages
from tests.plain.processes import ROOT, run_python

HEAVY = ("ray", "torch", "vllm", "transformers", "deepspeed")


def test_faulty_recipe_ends_the_real_command_with_one_line_in_less_than_two_seconds(recipe):
    path = recipe("[trainer]\nworker = 2\n")
    started = time.monotonic()
    result = subprocess.run([sys.executable, ROOT / "jobs" / "iterate.py", path], capture_output=True, text=True)
    assert time.monotonic() - started < 2.0
    assert result.returncode == 2
    assert result.stderr == f"error: {path}:12: trainer.worker: unknown option; did you mean 'workers'?\n"
    assert result.stdout == ""


def test_nothing_heavy_is_imported_before_the_recipe_is_valid(recipe):
    path = recipe("[trainer]\nworker = 2\n")
    code = f"import sys\nfrom evolve_ray.driver import main\nassert main([{str(path)!r}]) == 2\nprint(sorted(sys.modules))"
    loaded = run_python(code)
    assert "'evolve_ray.config'" in loaded
    assert [name for name in HEAVY if f"'{name}'" in loaded] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.bta=1"], "command line: training.bta: unknown option; did you mean 'beta'?"),
        (["--iterations", "-1"], "command line: iterations: is -1, but must be at least 0"),
        (["seed"], "command line: 'seed': must have the form key=value, for example training.beta=0.2"),
        (["--run", "s3://bucket"], "s3://bucket: must name a bucket and a prefix without . or ..; give s3://BUCKET/PREFIX"),
        (["--run", "ftp://host/run"], "ftp://host/run: ftp:// is not supported; give a folder, s3://BUCKET/PREFIX or gs://"),
        (["--work", "folder"], "--work folder: is only for runs in an object store; give the folder as --run"),
        (["--plan"], "prompts.jsonl: no such file"),
    ],
)
def test_fault_is_one_sentence_and_exit_code_two(recipe, capsys, arguments, message):
    assert main([str(recipe()), *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}")
    assert (said.err.count("\n"), said.out) == (1, "")


def test_overrides_may_stand_around_the_flags(recipe):
    given = parse(["a=1", "--run", "r", "b=2", "--iterations", "3", "c=3"])
    assert (given.recipe, given.overrides, given.run, given.iterations) == ("a=1", ["b=2", "c=3"], "r", 3)


def test_second_driver_ends_with_exit_code_three_and_names_the_first(recipe, tmp_path, capsys):
    with Run(tmp_path / "run").locked():
        assert main([str(recipe()), "--run", str(tmp_path / "run")]) == 3
    assert f'"pid": {os.getpid()}' in capsys.readouterr().err
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_fault_found_in_the_run_is_an_event_too_and_frees_the_lock(recipe, tmp_path, capsys):
    arguments = [str(recipe()), "--run", str(tmp_path / "run"), "model.path=./nowhere"]
    assert main(arguments) == main(arguments) == 2
    sentence = "model.path: ./nowhere: is not a model folder; use a Hugging Face model folder or name"
    assert capsys.readouterr().err.splitlines() == [f"error: {sentence}"] * 2
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["driver_start", "driver_failed"] * 2
    assert events[1]["error"] == f"UserError: {sentence}"


def test_unknown_fault_is_not_hidden(recipe, monkeypatch):
    monkeypatch.setattr(driver, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(recipe())])


@pytest.mark.parametrize(("name", "folder"), [("file:///a/b", "/a/b"), ("/a/../b", "/b")])
def test_run_folder_is_absolute(name, folder):
    assert str(run_folder(name)) == folder


def test_the_log_is_a_line_a_stage_and_verbose_adds_the_lines_below_it(capsys):
    for line in ("  iteration 1: generations", "    1 of 4 shards", "", "table"):
        print_stages(line)
    assert capsys.readouterr().out == "  iteration 1: generations\n\ntable\n"
    assert parse(["recipe.toml"]).verbose is False
    assert parse(["recipe.toml", "--verbose"]).verbose is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.betta=0.1", "command line: training.betta: unknown option; did you mean 'beta'?"),
        ("training.beta=true", "command line: training.beta: is True (true or false), but must be a number"),
        ("training.beta=-1", "command line: training.beta: is -1.0, but must be above 0.0"),
        (
            "scorer.name=reward_modle",
            "must be one of reward_model, verifier, mean, minimum, judge, vote, strategy or module:Name; did you mean",
        ),
        ("strategy.name=nowhere:Nothing", "strategy.name: 'nowhere:Nothing' cannot be loaded: No module named 'nowhere'"),
    ],
    ids=["unknown option", "wrong type", "out of range", "unknown name", "unknown plug"],
)
def test_every_kind_of_faulty_option_costs_less_than_two_seconds_and_loads_nothing_heavy(recipe, tmp_path, override, message):
    """Two seconds of this process: what a busy machine adds to them says nothing of the command."""
    arguments = [str(recipe()), override, "--run", str(tmp_path / "run")]
    code = (
        "import sys, time\nfrom evolve_ray.driver import main\n"
        f"assert main({arguments!r}) == 2\nprint(time.process_time(), sorted(sys.modules))"
    )
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given)
    assert (result.returncode, result.stderr.count("\n")) == (0, 1), result.stderr
    assert message in result.stderr
    seconds, _, loaded = result.stdout.splitlines()[-1].partition(" ")
    assert float(seconds) < 2.0
    assert [name for name in HEAVY if f"'{name}'" in loaded] == []


SLEEPER = """
import sys, time
from evolve_ray.errors import run_command
def work():
    print("working", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        if "ray" in sys.argv:  # what ray.get makes of an exception of a signal handler
            raise KeyboardInterrupt from None
        raise
sys.exit(run_command(work, "the same command"))
"""


@pytest.mark.parametrize("where", ["", "ray"])
def test_sigterm_ends_the_command_with_one_sentence_and_its_own_code(where):
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given
    )
    assert process.stdout.readline() == "working\n"
    process.terminate()
    assert process.communicate(timeout=20)[1] == "ended by SIGTERM; committed work is kept; continue with: the same command\n"
    assert process.returncode == 143


def test_full_disk_under_whatever_file_is_one_sentence_and_exit_code_five(capsys):
    def command():
        with open("/dev/full", "w") as file:
            file.write("x" * 10**6)

    assert run_command(command, "the same command") == 5
    assert capsys.readouterr().err.startswith("error: ")


def test_other_faults_of_files_are_not_taken_for_a_full_disk():
    with pytest.raises(FileNotFoundError):
        run_command(lambda: os.stat("/nowhere/at/all"), "the same command")


def test_disk_that_is_too_small_for_the_plan_is_refused_with_both_sizes(recipe, tmp_path):
    config = load(recipe(), ["prompts.per_iteration=1000000000000", "toy.seed=0", "prompts.path=toy:train"])
    with pytest.raises(ResourceError, match=r"3 iterations need about [\d,.]+ GiB .* but [\d,.]+ GiB are free"):
        check_space(config, Run(tmp_path))


def test_disk_that_is_large_enough_is_no_fault(recipe, tmp_path):
    check_space(load(recipe(), ["prompts.per_iteration=1", "sampling.max_tokens=8"]), Run(tmp_path))


def test_second_driver_is_told_in_less_than_five_seconds(recipe, tmp_path):
    """Seconds of its own work, as above."""
    with Run(tmp_path / "run").locked():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, ROOT / "jobs" / "iterate.py", recipe(), "--run", tmp_path / "run"]
        result = subprocess.run(command, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5.0
    assert (result.returncode, result.stderr.count("\n")) == (3, 1)
    assert f'"pid": {os.getpid()}' in result.stderr


def test_sigterm_while_ray_starts_is_told_like_any_other(monkeypatch, capfd):
    """Ray takes the signal over while it starts, and makes a SystemExit of it."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=lambda **_: sys.exit(15)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run_command(join_ray, "python jobs/iterate.py x") == 143
    assert "ended by SIGTERM; committed work is kept; continue with: python jobs/iterate.py x" in capfd.readouterr().err
