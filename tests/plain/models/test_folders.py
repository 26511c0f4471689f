"""A model folder that cannot do what the recipe asks of it is refused by the name of the option."""

import json
import os
import pickle

import pytest

from evolve_ray.errors import UserError
from evolve_ray.models.folders import check_policy, check_reward_model, check_vocabulary, content_hash, read_model_config, resolve
from evolve_ray.store.manifest import commit

POLICY = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256}
REWARD = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


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


def check_policy_at(path):
    check_policy(path, 128)


BOTH = pytest.mark.parametrize(
    ("check", "field", "config"), [(check_policy_at, "model.path", POLICY), (check_reward_model, "scorer.model", REWARD)]
)


@BOTH
def test_fitting_folder_passes(folder, check, field, config):
    check(folder(config))


@BOTH
def test_custom_code_is_refused(folder, check, field, config):
    with pytest.raises(UserError, match=rf"^{field}: .*auto_map in config\.json.*never run"):
        check(folder({**config, "auto_map": {"AutoModel": "evil.py"}}))


@BOTH
def test_pickled_weights_are_refused_and_never_opened(folder, tmp_path, check, field, config):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    path = folder(config, weights=None)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(UserError, match=rf"^{field}: .*has no \*\.safetensors"):
        check(path)
    assert not (tmp_path / "canary").exists()


@BOTH
def test_folder_without_config_is_refused(folder, check, field, config):
    path = folder(config)
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=rf"^{field}: .*has no config\.json"):
        check(path)


@BOTH
def test_broken_config_is_refused(folder, check, field, config):
    with pytest.raises(UserError, match=rf"^{field}: .*config\.json: is not valid JSON"):
        check(folder("{"))


@BOTH
def test_config_that_is_no_object_is_refused(folder, check, field, config):
    with pytest.raises(UserError, match=rf"^{field}: "):
        check(folder("[]"))


@pytest.mark.parametrize("names", [["LlamaForSequenceClassification"], ["BertModel"], [], None])
def test_policy_must_be_a_causal_language_model(folder, names):
    with pytest.raises(UserError, match=r"^model\.path: .*is not a causal language model"):
        check_policy(folder({**POLICY, "architectures": names}), 128)


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], [], None])
def test_reward_model_must_be_a_sequence_classifier(folder, names):
    with pytest.raises(UserError, match=r"^scorer\.model: .*is not a sequence classifier"):
        check_reward_model(folder({**REWARD, "architectures": names}))


def test_reward_model_must_have_one_output(folder):
    with pytest.raises(UserError, match=r"^scorer\.model: .*has 3 outputs"):
        check_reward_model(folder({**REWARD, "id2label": {"0": "bad", "1": "fair", "2": "good"}}))


def test_context_may_be_as_long_as_the_positions_and_no_longer(folder):
    check_policy(folder(POLICY), 256)
    with pytest.raises(UserError, match=r"^model\.context_tokens: is 257, but .* has 256 positions"):
        check_policy(folder(POLICY), 257)


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


@pytest.mark.parametrize("config", [{"vocab_size": 3}, {"text_config": {"vocab_size": 3}}])
def test_tokenizer_with_a_token_beyond_the_embedding_is_refused_with_the_token(folder, config):
    path = folder({**POLICY, **config})
    check_vocabulary(path, "model.path", {"a": 0, "b": 2})
    with pytest.raises(UserError, match=r"^model\.path: .*token '<x>' has id 3, but config\.json has vocab_size 3"):
        check_vocabulary(path, "model.path", {"a": 0, "<x>": 3, "<y>": 4})


def test_model_that_does_not_tell_its_vocabulary_passes(folder):
    check_vocabulary(folder(POLICY), "model.path", {"a": 10**9})
