"""Ray's own validation of the `ray up` files."""

import copy

import pytest
import yaml

from tests.plain.test_cluster import LAUNCHER


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_ray_up_takes_the_file(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(yaml.safe_load(path.read_text())))
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 4
    prepared["available_node_types"]["gpu"]["max_worker"] = 1  # a name that Ray does not know
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepared)
