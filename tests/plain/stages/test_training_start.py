"""What a training starts from: the checkpoint of the iteration before, or in every iteration the initial policy."""

import pytest

from evolve_ray.config.load import load
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.models.folders import content_hash
from evolve_ray.refine.template import load_template
from evolve_ray.stages import training
from evolve_ray.store import rows
from evolve_ray.store.run import Run, Stage


@pytest.fixture
def trained(recipe, tmp_path, monkeypatch):
    """Trains three iterations with a trainer that writes what it started from; gives their specs and the initial policy."""

    def run(*overrides):
        specs = []

        def train(context, spec, folder, name):
            specs.append(spec)
            (spec.checkpoint.start() / "model.safetensors").write_text(f"{spec.model} and more")
            return spec.checkpoint.commit(num_steps=1)

        monkeypatch.setattr(training, "run_group", train)
        config, root = load(recipe(), overrides), Run(tmp_path / "run")
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "model.safetensors").write_text("weights")
        policy = Policy(tmp_path / "base", content_hash(tmp_path / "base"))
        context = Context(config, root, lambda _: None, lambda: None, False, load_template("tiny", "conversation"), policy)
        monkeypatch.setattr(context.trackers, "log_training", lambda *_: None)
        context.initial = newest = policy
        for number in (1, 2, 3):
            stage = Stage(root.iteration(number) / "pairs", "pairs", f"pairs {number}")
            rows.write_table(stage.start() / "pairs.parquet", [], rows.PAIR)
            newest = training.train(context, number, newest, stage.commit(num_rows=0), config.training, "checkpoint")
        return specs, policy

    return run


@pytest.mark.parametrize("reference", ["iteration", "initial"])
def test_every_iteration_starts_from_the_same_weights_and_its_reference_is_what_it_starts_from(trained, reference):
    specs, initial = trained("training.start=initial", f"training.reference={reference}")
    assert [content_hash(type(initial.folder)(spec.model)) for spec in specs] == [initial.hash] * 3
    assert [spec.start_hash for spec in specs] == [initial.hash] * 3
    assert [(spec.reference_model, spec.reference_hash) for spec in specs] == [(str(initial.folder), initial.hash)] * 3


@pytest.mark.parametrize("reference", ["iteration", "initial"])
def test_without_it_each_iteration_starts_from_the_checkpoint_before(trained, reference):
    specs, initial = trained(f"training.reference={reference}")
    folders = [str(initial.folder), *(str(spec.checkpoint.final) for spec in specs[:2])]
    assert [spec.model for spec in specs] == folders
    assert [spec.start_hash for spec in specs] == [""] * 3
    assert [spec.reference_model for spec in specs] == (folders if reference == "iteration" else [str(initial.folder)] * 3)


def test_start_is_in_the_key_where_it_is_not_the_default(trained, tmp_path):
    before = trained("training.start=iteration")[0][0].checkpoint.key
    (tmp_path / "base").rename(tmp_path / "other")
    (tmp_path / "run").rename(tmp_path / "first")
    assert trained("training.start=initial")[0][0].checkpoint.key != before
