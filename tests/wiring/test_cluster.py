"""Ray's own validation of the `ray up` files and of the configuration of Serve."""

import copy

import pytest
import yaml

from tests.plain.test_cluster import CLUSTER, LAUNCHER, read


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_ray_up_takes_the_file(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(yaml.safe_load(path.read_text())))
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 4
    prepared["available_node_types"]["gpu"]["max_worker"] = 1  # a name that Ray does not know
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepared)


def test_serve_takes_its_configuration(monkeypatch):
    from ray.serve.schema import ServeDeploySchema

    from evolve_ray.serve import deploy

    config = read(CLUSTER / "serve.yaml")
    parsed = ServeDeploySchema.model_validate(config)
    assert parsed.model_dump(mode="json", exclude_unset=True) == config, "Serve leaves out a name that it does not know"
    (application,) = parsed.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(deploy, name).__module__ == module
    seen = []
    monkeypatch.setenv("EVOLVE_RAY_KEYS", "k" * 20)
    monkeypatch.setattr(deploy, "settings_of", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(deploy, "application", lambda settings: None)
    deploy.build(application.args)
    assert seen[0][0] == "/shared/runs/NAME"
