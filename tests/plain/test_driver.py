"""The command: one sentence on stderr, the documented exit code, and nothing heavy before the recipe is valid."""

import json
import os
import subprocess
import sys
import time

import pytest

from evolve_ray import driver
from evolve_ray.errors import UserError
from evolve_ray.store import Run
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
        (["--run", "s3://bucket/run"], "--run s3://bucket/run: s3:// is not supported yet"),
        (["--plan"], "prompts.jsonl: no such file"),
    ],
)
def test_fault_is_one_sentence_and_exit_code_two(recipe, capsys, arguments, message):
    assert driver.main([str(recipe()), *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}")
    assert (said.err.count("\n"), said.out) == (1, "")


def test_overrides_may_stand_around_the_flags(recipe):
    given = driver.parse(["a=1", "--run", "r", "b=2", "--iterations", "3", "c=3"])
    assert (given.recipe, given.overrides, given.run, given.iterations) == ("a=1", ["b=2", "c=3"], "r", 3)


def test_second_driver_ends_with_exit_code_three_and_names_the_first(recipe, tmp_path, capsys):
    with Run(tmp_path / "run").locked():
        assert driver.main([str(recipe()), "--run", str(tmp_path / "run")]) == 3
    assert f'"pid": {os.getpid()}' in capsys.readouterr().err
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_fault_found_in_the_run_is_an_event_too_and_frees_the_lock(recipe, tmp_path, capsys):
    arguments = [str(recipe()), "--run", str(tmp_path / "run"), "model.path=./nowhere"]
    assert driver.main(arguments) == driver.main(arguments) == 2
    sentence = "model.path: ./nowhere: is no model folder; give a Hugging Face folder or name"
    assert capsys.readouterr().err.splitlines() == [f"error: {sentence}"] * 2
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["driver_start", "driver_failed"] * 2
    assert events[1]["error"] == f"UserError: {sentence}"


def test_unknown_fault_is_not_hidden(recipe, monkeypatch):
    monkeypatch.setattr(driver.options, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        driver.main([str(recipe())])


@pytest.mark.parametrize(("name", "folder"), [("file:///a/b", "/a/b"), ("/a/../b", "/b")])
def test_run_folder_is_absolute(name, folder):
    assert str(driver.run_folder(name)) == folder


def test_run_folder_on_an_object_store_is_refused():
    with pytest.raises(UserError, match="storage that all nodes share"):
        driver.run_folder("gs://bucket")


def test_the_log_is_a_line_a_stage_and_verbose_adds_the_lines_below_it(capsys):
    for line in ("  iteration 1: generations", "    1 of 4 shards", "", "table"):
        driver.tell_stages(line)
    assert capsys.readouterr().out == "  iteration 1: generations\n\ntable\n"
    assert driver.parse(["recipe.toml"]).verbose is False
    assert driver.parse(["recipe.toml", "--verbose"]).verbose is True
