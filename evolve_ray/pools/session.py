"""Joins a Ray cluster or starts a local Ray, and leaves it."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from evolve_ray.config.options import Config
from evolve_ray.errors import ResourceError, first_line, is_lost_process, on_sigterm
from evolve_ray.watch.cluster import HeadWatch, RayletWatch
from evolve_ray.watch.metrics import Follower


def start_ray(config: Config, follower: Follower | None = None, *, loud: bool = False) -> None:
    """Joins the cluster that RAY_ADDRESS names (a submitted job has it), else starts a local Ray that ends with the driver."""
    if not os.environ.get("RAY_ADDRESS"):
        import_ray_for_loopback()
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Worker groups that load torch on busy machines need more than Ray's default of 30 s.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    # How often it is seen that they got on: a training ends up to twice as long after its last step, 2 s each by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    code = str(Path(__file__).resolve().parents[2])
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))}}
    local = {
        "address": "local",
        "num_cpus": config.ray.num_cpus or None,
        "object_store_memory": config.ray.object_store_mib << 20,
        "include_dashboard": config.ray.dashboard,
        "runtime_env": environment,
    }
    join_ray(local, loud=loud)
    if follower:
        follower.run.event("ray_joined", address=ray.get_runtime_context().gcs_address)
        follower.start()


def import_ray_for_loopback() -> None:
    """Ray reads once, at its import, whether a node may be part of a cluster; one that may not listens on loopback alone."""
    if "ray" not in sys.modules and NO_CLUSTER not in os.environ:
        os.environ[NO_CLUSTER] = "0"
        try:
            import ray  # noqa: F401
        finally:
            del os.environ[NO_CLUSTER]


NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # which Ray heeds on every system


def join_ray(local: dict[str, Any] | None = None, *, loud: bool = False) -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts the `local` one; `loud` prints what its workers print."""
    import ray

    where = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(log_to_driver=loud, logging_level="warning", **({} if where else local or {}))
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, on_sigterm)  # which Ray has taken over
    except SystemExit:  # and makes this of it meanwhile
        on_sigterm(signal.SIGTERM)
    except Exception as error:  # Ray raises a dozen kinds, and a bare Exception when a busy machine is too slow for it
        what = f"the cluster at RAY_ADDRESS {where} cannot be joined" if where else "a local Ray cannot be started"
        raise ResourceError(f"ray: {what}: {first_line(error)}; nothing is lost: submit the same command again") from None
    here = ray.get_runtime_context()
    head = HeadWatch(here.gcs_address)
    own = next(node for node in ray.nodes() if node["NodeID"] == here.get_node_id())
    address = f"{own['NodeManagerAddress']}:{own['NodeManagerPort']}"
    _watches.extend([head, RayletWatch(address, own["RayletSocketName"], head)])


_watches: list[HeadWatch] = []  # of the Ray that this process has joined
GOING_S = 5.0  # a raylet that goes down is dead to others before its process ends


def stop_ray() -> None:
    """Leaves Ray. After an error that a dying raylet may have caused, its watch has time to see that and to end this process."""
    error = sys.exception()
    if _watches and error and (isinstance(error, ResourceError) or is_lost_process(error)):
        time.sleep(GOING_S)
    while _watches:
        _watches.pop().stop()
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
