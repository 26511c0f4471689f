"""Joins a Ray cluster or starts a local Ray, and leaves it at the end."""

import contextlib
import logging
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

# A thread that waits for the others of its process sleeps. By default it spins: on a busy machine it holds the core that the
# thread it waits for needs, and many small kernels then take ten times as long.
THREADS_ENV = {"OMP_WAIT_POLICY": "PASSIVE"}


def start_ray(config: Config, follower: Follower | None = None, *, loud: bool = False) -> None:
    """Joins the cluster at RAY_ADDRESS, which Ray sets for a submitted job, or starts a local Ray that ends with the driver."""
    if not os.environ.get("RAY_ADDRESS"):
        import_ray_for_loopback()
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    wait_asleep()  # the processes of a local Ray inherit this environment
    # A worker group that loads torch on a busy machine needs more than Ray's default of 30 s.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    # Ray Train sees the end of a training up to two intervals after its last step; the default is 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    # A local Ray on few cores warns of more than four processes for each; most of ours only wait.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "4")
    package_root = str(Path(__file__).resolve().parents[2])
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))}}
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


def wait_asleep() -> None:
    """Sets `THREADS_ENV` for this process, if torch is not imported yet, and for those that it starts."""
    for name, value in THREADS_ENV.items():
        os.environ.setdefault(name, value)


def import_ray_for_loopback() -> None:
    """Imports Ray so that a local Ray listens on the loopback address only.

    Ray reads at its import whether this node may join a cluster; a node that may not listens on loopback.
    """
    if "ray" not in sys.modules and ENABLE_CLUSTER not in os.environ:
        os.environ[ENABLE_CLUSTER] = "0"
        try:
            import ray  # noqa: F401
        finally:
            del os.environ[ENABLE_CLUSTER]


ENABLE_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # in spite of its name, Ray reads it on every system


def join_ray(local: dict[str, Any] | None = None, *, loud: bool = False) -> None:
    """Joins the cluster at RAY_ADDRESS, or starts a local Ray with the arguments `local`, and watches its head and raylet.

    `loud` prints the output of the workers. ResourceError if Ray cannot be joined or started.
    """
    import ray

    cluster = os.environ.get("RAY_ADDRESS")
    # It reports at every start whether tokens guard a Ray that listens on loopback alone.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        ray.init(log_to_driver=loud, logging_level="warning", **({} if cluster else local or {}))
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init has installed its own handler
    except SystemExit:  # Ray's handler raises this for a SIGTERM
        on_sigterm(signal.SIGTERM)
    except Exception as error:  # Ray raises many classes, and a bare Exception if the machine is too slow
        what = f"the cluster at RAY_ADDRESS {cluster} cannot be joined" if cluster else "a local Ray cannot be started"
        raise ResourceError(f"ray: {what}: {first_line(error)}; nothing is lost: submit the same command again") from None
    context = ray.get_runtime_context()
    head = HeadWatch(context.gcs_address)
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    _watches.extend([head, RayletWatch(address, node["RayletSocketName"], head)])


_watches: list[HeadWatch] = []  # of the Ray that this process has joined
RAYLET_EXIT_S = 5.0  # Ray reports a dying raylet as dead some seconds before its process exits


def stop_ray() -> None:
    """Leaves Ray. If a dying raylet may have caused the current error, first gives its watch time to end this process."""
    error = sys.exception()
    if _watches and error and (isinstance(error, ResourceError) or is_lost_process(error)):
        time.sleep(RAYLET_EXIT_S)
    while _watches:
        _watches.pop().stop()
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
