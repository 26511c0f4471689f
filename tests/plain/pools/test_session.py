"""The environment of the processes that a run starts."""

import os

from evolve_ray.config.options import Engine
from evolve_ray.generate.worker import engine_pool
from evolve_ray.pools.session import wait_asleep


def test_threads_that_wait_sleep_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_engines_wait_asleep_on_every_node_unless_the_recipe_says_otherwise():
    assert engine_pool(Engine()).env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert engine_pool(Engine(env={"OMP_WAIT_POLICY": "ACTIVE"})).env["OMP_WAIT_POLICY"] == "ACTIVE"
