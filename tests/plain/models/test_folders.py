"""A model folder that cannot do what the recipe asks of it is refused by the name of the option."""

import json
import os
import pickle

import pytest

from evolve_ray.errors import UserError
from evolve_ray.models.folders import content_hash, read_model_config, resolve
from evolve_ray.store.manifest import commit

POLICY = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256}


@pytest.fixture
def folder(tmp_path):
    def make(config, weights="model.safetensors"):
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if weights:
            (path / weights).write_bytes(b"weights")
        return path

    return make


def test_custom_code_is_refused(folder):
    with pytest.raises(UserError, match=r"^model\.path: .*auto_map in config\.json.*never run"):
        read_model_config(folder({**POLICY, "auto_map": {"AutoModel": "evil.py"}}), "model.path")


def test_pickled_weights_are_refused_and_never_opened(folder, tmp_path):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    path = folder(POLICY, weights=None)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(UserError, match=r"^model\.path: .*has no \*\.safetensors"):
        read_model_config(path, "model.path")
    assert not (tmp_path / "canary").exists()


def test_folder_without_config_is_refused(folder):
    path = folder(POLICY)
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"^model\.path: .*has no config\.json"):
        read_model_config(path, "model.path")


def test_broken_config_is_refused(folder):
    with pytest.raises(UserError, match=r"^model\.path: .*config\.json: is not valid JSON"):
        read_model_config(folder("{"), "model.path")


def test_config_that_is_no_object_is_refused(folder):
    with pytest.raises(UserError, match=r"^model\.path: "):
        read_model_config(folder("[]"), "model.path")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_path_that_leads_nowhere_is_refused_by_its_option(name):
    with pytest.raises(UserError, match=rf"^scorer\.model: {name}: is not a model folder"):
        resolve(name, "scorer.model")


def test_folder_is_taken_as_it_is(folder):
    path = folder(POLICY)
    assert resolve(str(path), "model.path") == path
    assert read_model_config(path, "model.path") == POLICY


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_hash_of_a_model_changes_with_whatever_decides_what_it_computes(folder, name):
    path = folder(POLICY)
    before = content_hash(path)
    (path / name).write_bytes(b"other")
    assert content_hash(path) != before


def test_hash_of_a_model_does_not_change_with_notes_beside_it(folder):
    path = folder(POLICY)
    before = content_hash(path)
    (path / "README.md").write_text("a note")
    (path / "training_log.jsonl").write_text("{}")
    assert content_hash(path) == before


def test_committed_folder_has_the_hash_of_its_plain_copy(folder, tmp_path):
    before = content_hash(folder(POLICY))
    manifest = commit(folder(POLICY), tmp_path / "checkpoint", stage="checkpoint", key="k")
    assert content_hash(manifest.folder) == before
