"""jobs/report.py: one run's page again, or several runs on the splits that they share, and no others."""

import json
import re
import subprocess
import sys

import pytest

from evolve_ray.errors import UserError
from evolve_ray.report.runs import compare, labels, main, render
from tests.plain.processes import ROOT
from tests.plain.runs import chains, make_run

UP, DOWN = [[0, 1]] * 20, [[1, 0]] * 20


def runs(tmp_path, one, other):
    roots = [tmp_path / "one", tmp_path / "other"]
    for root, splits in zip(roots, (one, other), strict=True):
        make_run(root, {"base": splits, "iteration 1": splits})
    return roots


@pytest.fixture
def pair(tmp_path):
    return runs(tmp_path, {"held": chains(UP)}, {"held": chains(DOWN)})


def test_one_run_gets_its_page_again(pair, capsys):
    path = pair[0] / "report.html"
    before = path.read_bytes()
    path.unlink()
    assert main([str(pair[0])]) == 0
    assert path.read_bytes() == before
    assert "iteration 1" in capsys.readouterr().out


def test_a_page_elsewhere_leaves_the_run_as_it_is(pair, tmp_path):
    (pair[0] / "report.html").write_text("kept")
    assert main([str(pair[0]), "--html", str(tmp_path / "page.html"), "--json", str(tmp_path / "figures.json")]) == 0
    assert (pair[0] / "report.html").read_text() == "kept"
    assert "<svg" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "figures.json").read_bytes())["name"] == "one"


def test_models_of_several_runs_stand_side_by_side(pair, tmp_path, capsys):
    assert main([*map(str, pair), "--html", str(tmp_path / "page.html"), "--json", str(tmp_path / "figures.json")]) == 0
    told = capsys.readouterr().out
    lines = [re.split(r"\s{2,}", line)[1] for line in told.splitlines() if "exact match" in line]
    assert lines == ["one: base", "one: iteration 1", "other: base", "other: iteration 1"]
    figures = json.loads((tmp_path / "figures.json").read_bytes())
    assert [model["run"] for model in figures["models"]] == ["one"] * 2 + ["other"] * 2
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for shown in ("one: iteration 1", "other: iteration 1", "100.0 [83.9, 100.0]", "-100.0 [-100.0, -67.8]"):
        assert shown in text


def test_splits_that_only_one_run_has_are_left_out_and_named(tmp_path):
    roots = runs(tmp_path, {"held": chains(UP), "more": chains(UP)}, {"held": chains(DOWN)})
    found = compare(roots)
    assert {split for model in found["models"] for split in model["splits"]} == {"held"}
    assert found["notes"] == ["Left out, because not every run has them: more."]
    assert "not every run has them: more" in render(found)


def test_runs_with_other_prompts_in_a_split_are_refused(tmp_path, capsys):
    roots = runs(tmp_path, {"held": chains(UP)}, {"held": chains(UP, texts=[f"other {n}" for n in range(20)])})
    assert main([*map(str, roots)]) == 2
    told = capsys.readouterr().err
    assert f"split 'held': {roots[1]} has other prompts than {roots[0]}" in told


def test_where_the_prompts_lay_does_not_count(tmp_path):
    """The two runs read their prompts from files of different paths; see `make_run`."""
    roots = runs(tmp_path, {"held": chains(UP)}, {"held": chains(UP)})
    assert len(compare(roots)["models"]) == 4


def test_runs_without_a_common_split_are_refused(tmp_path):
    with pytest.raises(UserError, match="have no evaluation split in common"):
        compare(runs(tmp_path, {"one": chains(UP)}, {"two": chains(UP)}))


def test_what_is_no_run_is_named(tmp_path, pair, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'}: has no report.json" in capsys.readouterr().err
    (pair[0] / "report.json").write_text("{")
    assert main([str(pair[0])]) == 2
    assert "is not JSON" in capsys.readouterr().err
    with pytest.raises(UserError, match="named twice"):
        compare([pair[1], pair[1]])


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    assert labels([tmp_path / "a" / "tiny", tmp_path / "b" / "tiny"]) == ["a/tiny", "b/tiny"]
    assert labels([tmp_path / "a" / "tiny", tmp_path / "b" / "mine"]) == ["tiny", "mine"]


def test_the_command_runs(pair):
    command = [sys.executable, str(ROOT / "jobs" / "report.py"), *map(str, pair)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "other: iteration 1" in result.stdout
