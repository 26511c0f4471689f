"""The model card: all that a run knows of a model, in the hub's format, beside hashes that it cannot break."""

import json

import pytest
import yaml

from evolve_ray.config.load import load
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import IntegrityError
from evolve_ray.evaluate.figures import summarise
from evolve_ray.models import folders
from evolve_ray.report.card import write
from evolve_ray.store import rows
from evolve_ray.store.manifest import CARD, read_manifest
from evolve_ray.store.run import Run, Stage
from evolve_ray.train.export import unfinished_card
from tests.plain.runs import chains, commit, tables

BASE = chains([[0, 0], [1, 0], [0, 0], [0, 1]])
BETTER = chains([[1, 1], [1, 1], [0, 1], [0, 1]])


def commit_checkpoint(run, iteration, weights):
    stage = Stage(run.iteration(iteration) / "checkpoint", "checkpoint", f"key{iteration}")
    work = stage.start()
    (work / "config.json").write_text("{}")
    (work / "model.safetensors").write_text(weights)
    (work / CARD).write_text(unfinished_card("evolve", iteration, 40, 5, "r" * 64))
    return stage.commit(num_in=40, num_rows=40, num_steps=5)


@pytest.fixture
def made(recipe, tmp_path):
    """(run, configuration, models) of a run of one iteration after its evaluation."""
    run = Run(tmp_path / "run")
    told = load(recipe(f"[activation]\npath = '{recipe()}'\n"), ["name='a|b <i>'", "evaluation.splits.held=x.jsonl"])
    config = resolved(told)
    for name, size in (("prompts", 7), ("generations", 14)):
        commit(run.iteration(1) / name, [], rows.GENERATION)  # below with the size that the card shall tell
        path = run.iteration(1) / name / "MANIFEST.json"
        body = json.loads(path.read_bytes())
        path.write_text(json.dumps({**body, "stats": {**body["stats"], "num_rows": size}}))
    reference = Stage(run.iteration(1) / "reference", "reference", "key")
    reference.start()
    reference.commit(num_in=40, num_rows=40, policy="iteration", model="abcdef" * 10)
    found = [{"name": "base", "iteration": 0, "path": str(tmp_path / "base"), "model": "0" * 64}]
    for name, iteration in (("activation", 0), ("iteration 1", 1)):
        folder = commit_checkpoint(run, iteration, name).folder
        found.append({"name": name, "iteration": iteration, "path": str(folder), "model": folders.content_hash(folder)})
    for model, answers in zip(found, (BASE, BASE, BETTER), strict=True):
        drafts, scores = tables({"held": answers})
        prompts = [{"prompt_id": rows.content_id("held", name), "split": "held"} for name in [*answers, "lost"]]
        model["splits"] = summarise(prompts, drafts, scores)
    return run, config, found


def read(run, iteration):
    return (run.iteration(iteration) / "checkpoint" / CARD).read_text(encoding="utf-8")


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_card_has_evaluation_recipe_lineage_and_limits(made):
    run, _config, found = made
    write(*made)
    text = read(run, 1)
    assert "| held | iteration 1 | exact match % | 50.0 \\[" in text
    assert "| held | base | exact match % | 25.0 \\[" in text
    changes = "from the first round to the last, 2 answers became right and 0 became wrong; 2 stayed right and 0 stayed wrong"
    assert changes in text
    assert "objective evolve, alpha 0.5, beta 0.1" in text
    assert '"learning_rate": 5e-07' in text
    assert f"| activation |  |  | 40 | 5 | none | {found[1]['model']} |" in text
    assert f"| iteration 1 | 7 | 14 | 40 | 5 | iteration: abcdefabcdef | {found[2]['model']} |" in text
    assert "held: 1 of 5 prompts are not in the figures" in text
    assert "nothing was measured on other kinds of prompts" in text
    assert "held: 4 prompts are too few to say whether refinement helps; at least 50 are needed" in text
    assert "there is no verifier" in text
    assert "iteration 1" not in read(run, 0), "a card tells of its model and of those before"


def test_card_is_in_the_hubs_format(made):
    from huggingface_hub import ModelCard

    run, config, found = made
    config["model"]["path"] = "org/base-8B"
    write(run, config, found)
    told = front(read(run, 1))
    assert (told["library_name"], told["pipeline_tag"], told["base_model"]) == ("transformers", "text-generation", "org/base-8B")
    assert "evolve-ray" in told["tags"]
    assert ModelCard(read(run, 1)).data.base_model == "org/base-8B"


@pytest.mark.parametrize("path", ["toy:base", "/models/secret/base", "./base", "../a/base"])
def test_base_that_is_no_hub_name_is_not_named_as_one(made, path):
    run, config, found = made
    config["model"]["path"] = path
    write(run, config, found)
    assert "base_model" not in front(read(run, 1))


def test_local_folders_are_not_told(made, tmp_path):
    run, config, found = made
    config["model"]["path"] = str(tmp_path / "base")
    write(run, config, found)
    assert str(tmp_path) not in read(run, 1)
    assert "base: base" in read(run, 1)


def test_names_of_people_are_text_and_no_markup(made):
    write(*made)
    assert "# a\\|b \\<i\\>, iteration 1" in read(made[0], 1)


def test_card_changes_no_hash_and_no_identity(made):
    run, _config, found = made
    folder = run.iteration(1) / "checkpoint"
    before = read_manifest(folder, verify=True)
    assert CARD not in before.files
    write(*made)
    after = read_manifest(folder, verify=True)
    assert (after.identity, folders.content_hash(folder)) == (before.identity, found[2]["model"])
    assert Stage(folder, "checkpoint", "key1").committed() == before


def test_manifest_of_an_earlier_version_that_holds_the_card_is_no_corruption(made):
    run, _, _ = made
    path = run.iteration(1) / "checkpoint" / "MANIFEST.json"
    body = json.loads(path.read_bytes())
    body["files"][CARD] = {"bytes": 3, "sha256": "0" * 64}
    path.write_text(json.dumps(body))
    write(*made)
    assert read_manifest(path.parent, verify=True) is not None
    (path.parent / "model.safetensors").write_text("other")
    with pytest.raises(IntegrityError, match=r"model\.safetensors: sha256 is"):
        read_manifest(path.parent, verify=True)


def test_same_run_gives_the_same_card_and_leaves_it_alone(made):
    write(*made)
    path = made[0].iteration(1) / "checkpoint" / CARD
    before = path.stat().st_mtime_ns
    write(*made)
    assert path.stat().st_mtime_ns == before
    path.write_text("damaged")
    (path.parent / f".{CARD}.123").write_text("half a ca")
    write(*made)
    assert path.read_text().startswith("---\nlibrary_name")
    assert not list(path.parent.glob(".*"))


def test_models_from_elsewhere_keep_their_card(made, tmp_path):
    (tmp_path / "base").mkdir()
    write(*made)
    assert not list((tmp_path / "base").iterdir())


def test_iteration_that_was_rolled_back_says_so_and_is_in_no_later_lineage(made):
    run, config, found = made
    found[1] |= {"rolled_back": True, "decision": {"reason": "y1 fell"}}
    write(run, config, found)
    assert "**This iteration was rolled back**: y1 fell." in read(run, 0)
    assert "| held | activation |" not in read(run, 1)


def test_model_without_evaluation_says_so(made):
    run, config, found = made
    for model in found:
        model["splits"] = {}
    write(run, config, found)
    assert "This model was not evaluated." in read(run, 1)


@pytest.mark.parametrize(("objective", "tag"), [("reward", "text-classification"), ("dpo", "text-generation")])
def test_card_before_the_evaluation_says_that_nothing_is_measured(objective, tag):
    text = unfinished_card(objective, 2, 7, 3, "")
    assert front(text)["pipeline_tag"] == tag
    assert "7 pairs, 3 updates" in text
    assert "not evaluated, or not yet" in text
