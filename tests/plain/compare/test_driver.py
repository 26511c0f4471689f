"""The comparison's command, the names of models, and figures that are counted by hand or anew from the tables."""

import json
import random
import re

import numpy as np
import pytest

from evolve_ray.compare import driver
from evolve_ray.compare import tables as evaluate_tables
from evolve_ray.compare.figures import add_probes, model_differences, model_figures, paired_differences
from evolve_ray.compare.skill_probes import PROBES
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.models import checkpoints, folders
from evolve_ray.store.run import Run


def model_folder(path, weights="one"):
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (path / "model.safetensors").write_text(weights)
    return path


@pytest.fixture
def run(tmp_path):
    """A run directory with three evaluated models and its report."""
    root = tmp_path / "runs" / "small"
    names = {"base": tmp_path / "runs" / "world", "activation": root / "iteration-00" / "checkpoint",
             "iteration 1": root / "iteration-01" / "checkpoint"}  # fmt: skip
    listed = []
    for name, path in names.items():
        folder = model_folder(path, weights=name)
        listed.append({"name": name, "iteration": 0, "model": folders.content_hash(folder), "path": str(folder), "splits": {}})
    (root / "report.json").write_text(json.dumps({"name": "small", "run": str(root), "models": listed}))
    return root


@pytest.mark.parametrize(
    ("which", "name", "folder"),
    [
        ("", "small@1", "small/iteration-01/checkpoint"),
        ("@1", "small@1", "small/iteration-01/checkpoint"),
        ("@activation", "small@activation", "small/iteration-00/checkpoint"),
        ("@base", "small@base", "world"),
    ],
)
def test_a_run_is_its_last_model_and_names_its_earlier_ones(run, which, name, folder):
    found = checkpoints.find(f"{run}{which}")
    assert (found.name, found.folder, found.run) == (name, run.parent / folder, run)
    assert found.hash == folders.content_hash(found.folder)


def test_iteration_that_was_rolled_back_is_not_the_runs_last_model(run):
    report = json.loads((run / "report.json").read_text())
    report["models"][-1]["rolled_back"] = True
    (run / "report.json").write_text(json.dumps(report))
    assert checkpoints.find(str(run)).name == "small@activation"
    assert checkpoints.find(f"{run}@1").name == "small@1"


def test_unknown_model_of_a_run_is_told_which_there_are(run):
    with pytest.raises(UserError, match=r"the run has no model '7'; it has .*small@base, .*small@activation, .*small@1"):
        checkpoints.find(f"{run}@7")


def test_run_that_was_moved_with_its_neighbours_is_found_where_it_is(run, tmp_path):
    run.parent.rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "small"
    assert checkpoints.find(f"{moved}").folder == moved / "iteration-01" / "checkpoint"
    assert checkpoints.find(f"{moved}@base").folder == tmp_path / "elsewhere" / "world"


def test_model_that_is_not_the_one_of_the_report_is_refused(run):
    (run / "iteration-01" / "checkpoint" / "model.safetensors").write_text("other")
    with pytest.raises(IntegrityError, match=r"its content hash is \w{12}, but .*report\.json has"):
        checkpoints.find(str(run))


def test_model_that_is_gone_and_run_without_report_are_named(run):
    (run.parent / "world").rename(run.parent / "away")
    with pytest.raises(UserError, match="world: does not exist"):
        checkpoints.find(f"{run}@base")
    (run / "report.json").rename(run / "events.jsonl")
    with pytest.raises(UserError, match=r"has no report\.json yet"):
        checkpoints.find(str(run))
    (run / "report.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"report\.json: is damaged"):
        checkpoints.find(str(run))


def test_names_and_folders_tell_models_apart(run, tmp_path):
    one, other = model_folder(tmp_path / "a" / "m", "1"), model_folder(tmp_path / "b" / "m", "2")
    found = checkpoints.find_all([str(one), str(other), str(run)])
    assert [model.name for model in found] == [str(one), str(other), "small@1"]
    assert len({model.slug for model in found}) == 3
    assert all(re.fullmatch(r"[\w@.-]+", model.slug) for model in found)
    with pytest.raises(UserError, match="is given 2 times"):
        checkpoints.find_all([str(one), str(one)])


def test_no_model_is_named_as_what_it_is(tmp_path):
    with pytest.raises(UserError, match=f"MODEL {tmp_path}/none: .*is not a model folder"):
        checkpoints.find(f"{tmp_path}/none")


def test_overrides_are_told_from_models_and_splits_wherever_they_stand(tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    given = ["m", "seed=3", "sampling.temperature=0.5", str(odd), "verifier=none"]
    found = driver.sort_arguments(given, ["held=x.jsonl", "evaluation.rounds=2", "toy=none", "long=a=b"])
    assert found == (
        ["m", str(odd)],
        {"held": "x.jsonl", "long": "a=b"},
        ["seed=3", "sampling.temperature=0.5", "verifier=none", "evaluation.rounds=2", "toy=none"],
    )


@pytest.mark.parametrize(
    ("positional", "data", "message"),
    [
        (["m"], ["runs/tiny"], "--data runs/tiny: must have the form NAME=FILE_OR_DATASET"),
        (["m"], ["a=x", "a=y"], "the split is given twice"),
        (["seed=1"], [], "MODEL: is missing"),
    ],
)
def test_faulty_arguments_are_named(positional, data, message):
    with pytest.raises(UserError, match=re.escape(message)):
        driver.sort_arguments(positional, data)


def test_configuration_is_the_recipes_or_that_of_the_first_models_run(run, recipe):
    path = recipe("[evaluation.splits]\nheld = 'h.jsonl'\n")
    config = driver.configuration("m", str(path), {}, ["evaluation.rounds=2"])
    assert (config.evaluation.splits, config.evaluation.rounds) == ({"held": "h.jsonl"}, 2)
    (run / "config.json").write_text(json.dumps(resolved(config)))
    for first in (str(run), f"{run}@base"):
        found = driver.configuration(first, None, {"other": "o.jsonl"}, ["seed=5"])
        assert (found.evaluation.splits, found.evaluation.rounds, found.seed) == ({"other": "o.jsonl"}, 2, 5)
    with pytest.raises(UserError, match=r"command line: sampling\.temperatur: unknown option; did you mean 'temperature'"):
        driver.configuration(str(run), None, {}, ["sampling.temperatur=1"])
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: is missing; give the recipe with --recipe"):
        driver.configuration(str(run), None, {}, [])


def test_what_is_missing_is_named_with_the_option_that_gives_it(recipe):
    with pytest.raises(UserError, match=r"--recipe: is missing, and the first MODEL \(m\) is not a run"):
        driver.configuration("m", None, {}, [])
    with pytest.raises(UserError, match=r"--data: is missing"):
        driver.configuration("m", str(recipe()), {}, [])
    with pytest.raises(UserError, match=r"toy: 'toy:long' is part of the tiny world"):
        driver.configuration("m", str(recipe()), {"x": "toy:long"}, [])


def test_probes_are_chosen_by_name():
    assert driver.choose_probes(None) == PROBES
    assert driver.choose_probes("keep, majority") == ("keep", "majority")
    assert driver.choose_probes("none") == ()
    with pytest.raises(UserError, match="--probes lucky: unknown probe; choose from foreign, keep"):
        driver.choose_probes("lucky")


def test_fault_is_one_sentence_and_exit_code_two(recipe, capsys):
    assert driver.main(["./no/such", "--recipe", str(recipe()), "--data", "held=x.jsonl"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: MODEL ./no/such: ")
    assert (said.err.count("\n"), said.out) == (1, "")


# model -> prompt -> for each round (text, score, correct)
ONE = {"p": [("ab", 0.5, 0.0), ("abc", 1.0, 1.0), ("abc", 1.0, 1.0)], "q": [("xy", 1.0, 1.0), ("x", 0.0, 0.0), ("xy", 1.0, 1.0)]}
TWO = {"p": [("ab", 1.0, 1.0), ("ab", 1.0, 1.0), ("ab", 1.0, 1.0)], "q": [("xy", 1.0, 1.0), ("x", 0.0, 0.0), None]}
PROMPTS = [{"prompt_id": name, "split": "held"} for name in "pq"]


def tables(table, place="round", split="held", verified=True):
    drafts, scores = [], []
    for name, rounds in table.items():
        for number, given in enumerate(rounds, 1):
            text, score, correct = given or ("?", None, None)
            drafts.append(
                {"draft_id": f"{name}{number}", "prompt_id": name, "split": split, "sample": 0, "round": 1, place: number,
                 "text": text, "num_tokens": len(text), "num_prompt_tokens": 3 * number, "finish_reason": "stop"}
            )  # fmt: skip
            if given:
                scores.append({"draft_id": f"{name}{number}", "prompt_id": name, "score": score,
                               "correct": correct if verified else None})  # fmt: skip
    return drafts, scores


def test_rounds_of_one_model_by_hand():
    figures, chains = model_figures(PROMPTS, tables(ONE))
    held = figures["held"]
    assert list(chains["held"]) == ["p", "q"]
    assert [held["rounds"][n]["exact_match"]["mean"] for n in "123"] == [0.5, 0.5, 1.0]
    last = held["rounds"]["3"]
    assert last["against_previous"] == {
        "improved": 1, "degraded": 0, "unchanged": 1, "same_text": 1, "wrong_to_right": 1, "right_to_wrong": 0,
        "kept_right": 1, "kept_wrong": 0,
    }  # fmt: skip
    assert (last["no_change"], held["rounds"]["2"]["no_change"]) == (0.5, 0.0)
    assert last["similarity_previous"] == pytest.approx((1.0 + 0.5) / 2)
    # p: ab-abc 2/3, ab-abc 2/3, abc-abc 1; q: xy-x 1/2, xy-xy 1, x-xy 1/2
    assert last["similarity_chain"] == pytest.approx(((2 / 3 + 2 / 3 + 1) / 3 + (0.5 + 1 + 0.5) / 3) / 2)
    assert (last["mean_prompt_tokens"], last["mean_response_tokens"]) == (9, 2.5)
    assert last["distinct_1"] == pytest.approx(5 / 5)
    assert last["distinct_2"] == pytest.approx(3 / 3)


def test_models_are_paired_on_the_prompts_that_both_have_whole():
    chains = {name: model_figures(PROMPTS, tables(table))[1] for name, table in (("one", ONE), ("two", TWO))}
    (found,) = model_differences(chains)
    assert (found["model"], found["against"]) == ("two", "one")
    held = found["splits"]["held"]
    assert held["n"] == 1  # q lost its last score in two
    assert [held["rounds"][n]["reward"]["mean"] for n in "123"] == [0.5, 0.0, 0.0]
    assert held["gain"]["exact_match"]["mean"] == -1.0  # two has nothing to gain on p, one gains 1
    assert held["gain"]["reward"]["mean"] == -0.5


def test_models_without_a_common_prompt_have_no_difference():
    chains = model_figures(PROMPTS, tables(ONE))[1]["held"]
    assert paired_differences({"p": chains["p"]}, {"q": chains["q"]}) == {"n": 0, "rounds": {}}


def test_three_models_are_compared_every_two():
    chains = {name: model_figures(PROMPTS, tables(ONE))[1] for name in "abc"}
    found = model_differences(chains)
    assert [(pair["model"], pair["against"]) for pair in found] == [("b", "a"), ("c", "a"), ("c", "b")]
    assert all(figures["mean"] == 0.0 for pair in found for figures in pair["splits"]["held"]["gain"].values())


def random_table(seed, prompts=40, rounds=4):
    draw = random.Random(seed)
    return {f"p{n}": [(draw.choice("abcd") * draw.randint(1, 5), draw.random(), float(draw.random() < 0.5))
                      if draw.random() > 0.02 else None for _ in range(rounds)] for n in range(prompts)}  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_figures_agree_with_a_recomputation_by_other_means(seed):
    """Arrays in place of chains of rows; no code is shared with the figures."""
    first, second = random_table(seed), random_table(seed + 10)
    asked = [{"prompt_id": name, "split": "held"} for name in first]
    found = {name: model_figures(asked, tables(table)) for name, table in (("one", first), ("two", second))}
    arrays = {}
    for name, table in (("one", first), ("two", second)):
        whole = {prompt: rounds for prompt, rounds in table.items() if None not in rounds}
        arrays[name] = {prompt: np.array([[score, right] for _, score, right in rounds]) for prompt, rounds in whole.items()}
        values = np.stack(list(arrays[name].values()))  # prompt, round, (score, right)
        figures = found[name][0]["held"]
        for number in range(1, 5):
            here = figures["rounds"][str(number)]
            assert here["n"] == len(whole)
            assert here["reward"]["mean"] == pytest.approx(values[:, number - 1, 0].mean())
            assert here["exact_match"]["mean"] == pytest.approx(values[:, number - 1, 1].mean())
            if number > 1:
                before, after = values[:, number - 2, 1], values[:, number - 1, 1]
                moved = here["against_previous"]
                table_of = np.array(
                    [[moved["kept_wrong"], moved["wrong_to_right"]], [moved["right_to_wrong"], moved["kept_right"]]]
                )
                counted = np.zeros((2, 2), int)
                np.add.at(counted, (before.astype(int), after.astype(int)), 1)
                assert (table_of == counted).all()
                texts = [(rounds[number - 2][0], rounds[number - 1][0]) for rounds in whole.values()]
                assert here["no_change"] == pytest.approx(np.mean([one == other for one, other in texts]))
    common = [prompt for prompt in arrays["one"] if prompt in arrays["two"]]
    apart = np.stack([arrays["two"][p] for p in common]) - np.stack([arrays["one"][p] for p in common])
    (difference,) = model_differences({name: chains for name, (_, chains) in found.items()})
    held = difference["splits"]["held"]
    assert held["n"] == len(common)
    for number in range(1, 5):
        for place, measure in enumerate(("reward", "exact_match")):
            assert held["rounds"][str(number)][measure]["mean"] == pytest.approx(apart[:, number - 1, place].mean())
            assert held["gain"][measure]["mean"] == pytest.approx((apart[:, 3, place] - apart[:, 0, place]).mean())
    # The interval of a paired difference, from its own definition.
    values = apart[:, 3, 0]
    resampled = values[np.random.default_rng(0).integers(len(values), size=(200, len(values)))].mean(axis=1)
    interval = held["rounds"]["4"]["reward"]
    assert (interval["low"], interval["high"]) == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.06)


def evaluation(verified=True):
    figures, chains, parts = {}, {}, {}
    given = {name: [rounds[0], rounds[1]] for name, rounds in ONE.items()}
    for name, table in (("one", ONE), ("two <b>", TWO)):
        figures[name], chains[name] = model_figures(PROMPTS, tables(table, verified=verified))
        samples = {prompt: [rounds[0], rounds[1], rounds[0]] for prompt, rounds in ONE.items()}
        parts[name] = {"foreign": tables(given, verified=verified), "keep": tables(given, verified=verified),
                       "parallel": tables(samples, place="sample", verified=verified),
                       "longer": tables({prompt: rounds[:1] for prompt, rounds in ONE.items()}, verified=verified)}  # fmt: skip
    same = lambda one, other: one == other  # noqa: E731
    add_probes(figures, chains, parts, PROMPTS, PROBES, same, longer_tokens=96)
    listed = [{"name": name, "model": "f" * 64, "path": "/m", "splits": splits} for name, splits in figures.items()]
    return {"models": listed, "differences": model_differences(chains), "foreign": "y1 of one"}


def test_every_probe_is_in_the_figures_of_every_model_and_split():
    found = evaluation()
    for model in found["models"]:
        made = model["splits"]["held"]["probes"]
        assert set(made) == set(PROBES)
        assert made["foreign"]["difference"]["exact_match"]["mean"] == 0.0  # p mended, q spoilt
        assert (made["keep"]["n"], made["keep"]["kept"]["mean"]) == (1, 0.0)
        assert (made["longer"]["max_tokens"], made["longer"]["n"]) == (96, made["parallel"]["n"])
        assert made["parallel"]["n"] == (2 if model["name"] == "one" else 1)


@pytest.mark.parametrize("verified", [True, False])
def test_tables_name_every_model_and_the_page_escapes_them(tmp_path, verified):
    found = evaluation(verified)
    said = evaluate_tables.text(found)
    for part in (
        "one",
        "two <b>",
        "two <b> - one",
        "y3 - y1",
        "foreign draft (y1 of one)",
        "equal tokens",
        "one answer of up to 96 tokens, last round",
        "By round",
        "unchanged %",
    ):
        assert part in said
    assert ("exact match %" in said) == verified
    assert ("y_last - y1 where y1 wrong" in said) == verified
    assert ("y_last - y1 where y1 low" in said) != verified
    evaluate_tables.write(Run(tmp_path), found)
    assert json.loads((tmp_path / "evaluation.json").read_text())["models"] == json.loads(json.dumps(found["models"]))
    page = (tmp_path / "evaluation.html").read_text()
    assert "two &lt;b&gt;" in page
    assert "two <b>" not in page
    assert "Quality against compute" in page
    assert "one longer answer (two &lt;b&gt;)" in page
    assert "best of 3, parallel" in page
    assert "http" not in page.replace("http-equiv", "")


def test_lines_from_few_prompts_are_no_ground_for_a_conclusion(tmp_path):
    found, warning = evaluation(), "Lines with n below 50 rest on too few prompts: conclude nothing from them."
    assert evaluate_tables.text(found).endswith(f"\n\n{warning}")
    assert evaluate_tables.page(found).count(warning) == 3  # by round, differences, probes
    enough = [("title", ["model", "n"], [["one", "50"]]), ("title", ["model", "cut"], [["one", "3"]])]
    assert evaluate_tables.warning(enough) == ""


def test_models_of_one_probe_stand_together_in_the_table():
    lines = [line for line in evaluate_tables.probe_rows(evaluation()) if line[3] == "exact match %"]
    titles = [line[1] for line in lines]
    assert len(set(titles)) < len(titles)
    assert [title for n, title in enumerate(titles) if n == 0 or titles[n - 1] != title] == list(dict.fromkeys(titles))


def test_split_without_whole_chains_has_no_lines():
    nothing = {name: [None, *rounds[1:]] for name, rounds in ONE.items()}
    figures, chains = model_figures(PROMPTS, tables(nothing))
    parts = {"one": {"parallel": tables(nothing), "keep": tables(nothing)}}
    add_probes({"one": figures}, {"one": chains}, parts, PROMPTS, PROBES, lambda a, b: a == b)
    found = {"models": [{"name": "one", "model": "f", "path": "/m", "splits": figures}], "differences": [], "foreign": None}
    assert evaluate_tables.text(found) == ""
    assert figures["held"]["rounds"] == {}
