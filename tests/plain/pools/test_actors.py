"""When an idle worker group makes room for other actors: counted by what the pools have reserved."""

import sys
from types import SimpleNamespace

import pytest

from evolve_ray.errors import ResourceError
from evolve_ray.pools.actors import TRAINERS, Actors, Host, PoolOptions, Pools


class Kept(Actors):
    def __init__(self, options):
        super().__init__([], options)
        self.stopped = False

    def stop(self):
        self.stopped = True


@pytest.fixture
def cluster(monkeypatch):
    """A cluster as a dictionary: CPUs, GPUs, nodes; its actors are strings."""
    size = {"CPU": 2.0, "GPU": 0.0, "nodes": 1}
    started = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *given: f"actor {given[1]}"))
    ray = SimpleNamespace(
        cluster_resources=lambda: {name: size[name] for name in ("CPU", "GPU") if size[name]},
        nodes=lambda: [{"Alive": True}] * size["nodes"] + [{"Alive": False}],
        remote=lambda _: started,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    return size


def pool(name, actors, cpus, gpus=0.0):
    return PoolOptions(name, object, actors, cpus, gpus, restarts=0)


def with_group(*others, cpus=0.4, gpus=0.0):
    """Open pools with the worker group of two beside them."""
    pools, group = Pools(), Kept(pool(TRAINERS, 2, cpus, gpus))
    for options in others:
        pools.keep(Kept(options))
    pools.keep(group)
    return pools, group


def test_new_actors_leave_the_group_alone_where_one_node_has_room_for_both(cluster):
    pools, group = with_group(pool("engines", 2, 0.4))
    assert pools.open(pool("probers", 1, 0.1)) == ["actor 0"]
    assert not group.stopped
    assert pools.opened(TRAINERS) is group


@pytest.mark.parametrize(
    ("size", "more"),
    [
        ({}, pool("scorers", 1, 0.31)),  # 2 CPUs less 1.6 of the pools and 0.1 for the dispatchers leave 0.3
        ({"nodes": 2, "CPU": 64.0}, pool("scorers", 1, 0.1)),  # which node has how much is not known
        ({"CPU": 64.0, "GPU": 2.0}, pool("scorers", 1, 0.1, 1.0)),
    ],
)
def test_group_ends_where_new_actors_may_not_fit_beside_it(cluster, size, more):
    cluster |= size
    pools, group = with_group(pool("engines", 2, 0.4), gpus=1.0 if "GPU" in size else 0.0)
    pools.open(more)
    assert group.stopped
    assert pools.opened(TRAINERS) is None
    assert pools.opened("scorers") is not None


def test_group_of_which_nothing_is_left_for_the_dispatchers_does_not_stay(cluster):
    assert not with_group(pool("engines", 2, 0.6))[0].fits()
    assert with_group(pool("engines", 2, 0.55))[0].fits()


def test_open_pool_is_given_back_as_it_is(cluster):
    pools, group = with_group(pool("engines", 2, 0.6))
    engines = pools.opened("engines")
    assert pools.open(pool("engines", 2, 0.6)) is engines
    assert not group.stopped


class NeverThere:
    """A worker whose engine ends its process, which a test can only raise."""

    def __init__(self, spec):
        raise KeyboardInterrupt


@pytest.mark.parametrize(("verb", "name"), [("answer", "model critic"), ("commit_shard", "engines")])
def test_engine_that_dies_at_every_start_is_given_up_with_the_name_of_its_pool(tmp_path, verb, name):
    spec = SimpleNamespace(work=str(tmp_path))
    for _ in range(3):  # the first start and two restarts
        with pytest.raises(KeyboardInterrupt):
            Host(NeverThere, 1, name, restarts=2).call(spec, verb, 0)
    with pytest.raises(ResourceError, match=rf"^{name}: the actor died 3 times while it started"):
        Host(NeverThere, 1, name, restarts=2).call(spec, verb, 0)
