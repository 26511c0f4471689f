"""What is served: names, defaults without a recipe, keys, hosts, and the plan as text."""

import pickle

import pytest

from evolve_ray.errors import UserError
from evolve_ray.serve.settings import check_host, describe, hash_key, read_keys, settings_of
from tests.tensors import zoo

KEY, OTHER = "k" * 16, "other-key-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return zoo.save("llama_dropout", tmp_path_factory.mktemp("served") / "my-model", max_position_embeddings=512)


def test_a_folder_without_a_recipe_gets_defaults_that_fit_it(folder):
    found = settings_of(str(folder), None, [])
    config = found.config
    assert (found.name, found.has_recipe, found.has_scorer) == ("my-model", False, False)
    assert (config.model.context_tokens, config.sampling.max_tokens) == (512, 128)
    assert config.engine.args["enforce_eager"] is True
    assert settings_of(str(folder), None, ["engine.gpus_per_actor=1"]).config.engine.args == {}
    assert settings_of(str(folder), None, ["strategy.rounds=2"]).config.strategy.rounds == 2
    assert settings_of(str(folder), None, [], "another").name == "another"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.name=other.module:Engine", "engine.name: is 'other.module:Engine', but only 'vllm' can serve"),
        ("serve.max_replicas=1", r"serve.max_replicas: is 1, but must be 0 or at least serve.replicas \(2\)"),
        ("serve.max_round=3", "max_rounds"),
        ("strategy.name=no.such:Strategy", "strategy.name"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_starts(folder, override, message):
    with pytest.raises(UserError, match=message):
        settings_of(str(folder), None, ["serve.replicas=2", override])


def test_keys_are_read_from_the_environment_and_only_their_hashes_kept(folder, monkeypatch):
    monkeypatch.setenv("KEYS", f"{KEY},{OTHER}\n {KEY}")
    keys = read_keys(["KEYS"])
    assert keys == (KEY, OTHER)
    found = settings_of(str(folder), None, [], keys=keys)
    assert found.key_hashes == (hash_key(KEY), hash_key(OTHER))
    for text in (repr(found), describe(found, "0.0.0.0", 80), pickle.dumps(found).decode("latin-1")):
        assert KEY not in text
        assert OTHER not in text
    assert "2 accepted" in describe(found, "0.0.0.0", 80)


@pytest.mark.parametrize(
    ("value", "message"),
    [("", "not set or empty"), (" , ", "not set or empty"), ("short", "at least 16 ASCII"), ("ключ" * 8, "at least 16 ASCII")],
)
def test_keys_that_protect_nothing_are_refused_without_being_quoted(value, message, monkeypatch):
    monkeypatch.setenv("KEYS", value)
    with pytest.raises(UserError, match=message) as caught:
        read_keys(["KEYS"])
    assert not value.strip(" ,") or value not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "127.0.0.2", ""])
def test_an_address_that_others_reach_needs_a_key(host):
    with pytest.raises(UserError, match="needs keys"):
        check_host(host, ())
    check_host(host, (KEY,))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_none(host):
    check_host(host, ())


def test_the_plan_says_what_would_start(folder):
    text = describe(settings_of(str(folder), None, ["serve.replicas=2", "serve.max_replicas=4"]), "127.0.0.1", 8000)
    for part in ("my-model: ", "http://127.0.0.1:8000", "none needed", "2 to 4, each", "chain, 4 rounds", "context 512",
                 "of generation_config.json", "scorer     none"):  # fmt: skip
        assert part in text, part
    assert "best_of" not in text, "which needs a scorer"
