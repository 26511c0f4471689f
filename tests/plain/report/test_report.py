"""A report that shows what was measured."""

import json

import pytest

from evolve_ray.report.report import PageWriter, stage_rows, write
from evolve_ray.report.tables import table, table_rows
from evolve_ray.store.run import Run, Stage


def figures(mean, n=8):
    return {"n": n, "mean_response_tokens": 5.0, "reward": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}


def model(name, *means, exact=False, splits=("held",)):
    rounds = {str(number): figures(mean) for number, mean in enumerate(means, start=1)}
    for values in rounds.values():
        values |= {"exact_match": values["reward"]} if exact else {}
    gain = {measure: values for measure, values in rounds[str(len(means))].items() if measure != "n"}
    found = {"name": name, "iteration": 0, "path": f"/run/{name}"}
    return {**found, "splits": {split: {"num_prompts": 9, "rounds": rounds, "gain": gain} for split in splits}}


CONFIG = {"name": "caf\u00e9", "engine": {"actors": 2}}


def rendered(*models, stages=(), name="small"):
    return {"name": name, "run": "/run", "config": {}, "models": list(models), "stages": list(stages)}


def test_table_has_a_column_for_each_round_and_the_gain():
    header, lines = table_rows(rendered(model("base", 0.25, 0.5)))
    assert header == ["split", "model", "measure", "y1", "y2", "y2 - y1", "n"]
    one, two = "0.250 [0.150, 0.350]", "0.500 [0.400, 0.600]"
    assert lines == [["held", "base", "reward", one, two, two, "8"]]


def test_exact_match_is_shown_in_percent_above_the_reward():
    lines = [line.split() for line in table(rendered(model("base", 0.25, exact=True))).splitlines() if line]
    assert lines[1][:6] == ["held", "base", "exact", "match", "%", "25.0"]
    assert lines[2][:4] == ["held", "base", "reward", "0.250"]


def test_every_model_and_split_is_a_line_as_wide_as_the_header():
    header, lines = table_rows(rendered(model("base", 0.1, splits=("held", "long")), model("iteration 1", 0.2, 0.3)))
    assert [line[:2] for line in lines] == [["held", "base"], ["held", "iteration 1"], ["long", "base"]]
    assert {len(line) for line in lines} == {len(header)}


def test_table_without_any_evaluation_renders():
    assert table(rendered({"name": "base", "splits": {}})).startswith("split")
    assert table(rendered({"name": "base", "splits": {"held": {"num_prompts": 1, "rounds": {}}}})).count("\n") == 0


@pytest.fixture
def run(tmp_path):
    """A run with one committed stage whose computation took two attempts."""
    run = Run(tmp_path)
    stage = Stage(run.iteration(1) / "pairs", "pairs", "key")
    stage.start()
    stage.commit([{"id": "x"}], num_in=5, num_rows=2)
    for seconds in (1.5, 2.0):
        run.event("stage_end", stage="pairs", iteration=1, seconds=seconds)
    return run


def test_stages_are_listed_with_counts_and_all_seconds(run):
    stage = {"iteration": 1, "stage": "pairs", "seconds": 3.5, "num_in": 5, "num_rows": 2, "num_rejected": 1}
    assert stage_rows(run) == [stage]


def test_report_is_written_as_json_and_as_a_page(run):
    written = write(run, CONFIG, [model("base", 0.5)])
    assert json.loads((run.root / "report.json").read_bytes()) == written
    assert written["stages"][0]["stage"] == written["ledger"]["stages"][0]["stage"] == "pairs"
    assert written["ledger"]["total"]["seconds"] == 3.5
    assert written["compute"][0]["chain"][0]["mean_tokens"] == 5.0
    assert "caf\u00e9" in (run.root / "report.html").read_text(encoding="utf-8")


def test_a_page_that_is_drawn_later_is_that_of_the_moment_it_was_asked_for(run):
    asked, models = [], [model("base", 0.5)]
    write(run, CONFIG, models, asked.append)
    assert not (run.root / "report.json").exists()
    models.append(model("iteration 1", 0.6))
    (draw,) = asked
    draw()
    assert [found["name"] for found in json.loads((run.root / "report.json").read_bytes())["models"]] == ["base"]
    assert "iteration 1" not in (run.root / "report.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_drawn_aside_is_an_error_of_the_next_one_or_of_the_end(run):
    writer, done = PageWriter(), []
    writer.wait()

    def fail():
        raise OSError("the disk is full")

    writer(fail)
    with pytest.raises(OSError, match="the disk is full"):
        writer(lambda: done.append(1))
    assert done == []
    with pytest.raises(OSError, match="the disk is full"):
        writer.wait()


def test_the_checkpoint_is_that_of_the_last_model_that_was_not_rolled_back(run):
    models = [model("base", 0.5), {**model("iteration 1", 0.6), "rolled_back": False}]
    assert write(run, CONFIG, models)["checkpoint"] == "/run/iteration 1"
    models += [{**model("iteration 2", 0.7), "rolled_back": True}]
    written = write(run, CONFIG, models)
    assert (written["checkpoint"], len(written["models"])) == ("/run/iteration 1", 3)
    assert "iteration 2 (rolled back)" in table(written)


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\u2029"])
def test_events_with_unicode_line_separators_are_read(run, character):
    run.event("driver_failed", error=f"p.jsonl:1: has no column 'prompt'; its columns are: a{character}b")
    assert stage_rows(run)[0]["seconds"] == 3.5
