"""What a worker group has reserved is free again after its controller was lost."""

import time

from evolve_ray.pools.actors import TRAINERS, PoolOptions
from evolve_ray.train.group import free_places


def reserver():
    """An actor that reserves two places, as Ray Train's controller does."""
    import ray

    class Reserver:
        def reserve(self, cpus):
            from ray.util.placement_group import placement_group

            place = placement_group([{"CPU": cpus}] * 2)
            ray.get(place.ready())
            return place.id.hex()

    return ray.remote(num_cpus=0)(Reserver).remote()


def test_places_of_a_lost_controller_are_freed_and_those_of_others_stay(local_ray):
    import ray
    from ray.util.placement_group import placement_group_table, remove_placement_group

    lost, other = reserver(), reserver()
    names = ray.get(lost.reserve.remote(0.21)), ray.get(other.reserve.remote(0.22))

    def states():
        return [placement_group_table()[name]["state"] for name in names]

    ray.kill(lost)
    time.sleep(1)
    assert states() == ["CREATED", "CREATED"], "Ray itself would keep it"
    free_places(PoolOptions(TRAINERS, object, 2, 0.21, 0.0, restarts=0))
    deadline = time.monotonic() + 20
    while states()[0] != "REMOVED" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert states() == ["REMOVED", "CREATED"]
    remove_placement_group(ray.util.placement_group.PlacementGroup(ray.PlacementGroupID(bytes.fromhex(names[1]))))
    ray.kill(other)
