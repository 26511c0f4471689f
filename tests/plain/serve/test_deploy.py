"""Arguments of the application in a configuration file of Serve."""

import pytest

from evolve_ray.errors import UserError
from evolve_ray.serve import deploy


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modell": "x"}, "args.modell: unknown argument; the arguments are model, recipe"),
        ({"model": 3}, "args.model: is 3, but must be a str"),
        ({"model": "x", "options": "a=b"}, "args.options: is 'a=b', but must be a list"),
        ({}, "args.model: is missing"),
        ({"model": "x"}, "args.api_key_env: is missing; name an environment variable"),
        ({"model": "x", "api_key_env": []}, "args.api_key_env: is missing"),
        ({"model": "x", "api_key_env": ["NOT_THERE"]}, "NOT_THERE: the environment variable is not set"),
    ],
)
def test_arguments_are_read_strictly_and_keys_are_wanted(args, message):
    with pytest.raises(UserError, match=message):
        deploy.build(args)


def test_arguments_reach_the_settings(monkeypatch):
    seen = []
    monkeypatch.setenv("KEYS", "k" * 20)
    monkeypatch.setattr(deploy, "settings_of", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(deploy, "application", lambda settings: "the application")
    args = {"model": "m", "recipe": "r.toml", "options": ["a=1"], "name": "n", "api_key_env": ["KEYS"]}
    assert deploy.build(args) == "the application"
    deploy.build({"model": "m", "open_to_all": True})
    assert seen == [("m", "r.toml", ["a=1"], "n", ("k" * 20,)), ("m", None, [], None, ())]
