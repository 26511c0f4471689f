"""The command around a run: arguments, plan, lock, Ray, and one sentence at the end if something is wrong."""

import argparse
import contextlib
import functools
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from evolve_ray.config.load import load
from evolve_ray.config.options import Config
from evolve_ray.errors import ResourceError, UserError, first_line, is_lost_process, on_sigterm, run_command
from evolve_ray.head import HeadWatch, RayletWatch
from evolve_ray.keeper import kept
from evolve_ray.metrics import Follower
from evolve_ray.objects import check_uri, is_uri
from evolve_ray.sizing import Cluster, cluster_of_ray
from evolve_ray.store import Run, submission_id


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="iterate.py",
        description="Runs the iterations of a recipe; the same command again continues from what is committed.",
    )
    parser.add_argument("recipe", metavar="RECIPE.toml", help="a recipe; the shipped ones are in jobs/recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options that replace the recipe's, e.g. training.beta=0.2"
    )
    parser.add_argument("--run", help="the run directory or s3://BUCKET/PREFIX (default: runs/NAME, NAME from the recipe)")
    parser.add_argument("--work", help="the folder in which a run of an object store works (default: runs/s3/BUCKET/PREFIX)")
    parser.add_argument("--iterations", type=int, help="how many iterations (the recipe's `iterations`)")
    parser.add_argument("--plan", action="store_true", help="print what would run and what it would take, then stop")
    parser.add_argument("--verbose", action="store_true", help="print shards and steps too, not a line a stage")
    parser.add_argument("--rerun-changed", action="store_true", help="compute again the stages whose options or inputs changed")
    told = parser.add_argument_group("the cluster, for --plan (without these: the one that RAY_ADDRESS names)")
    told.add_argument("--nodes", type=positive(int), help="nodes with GPUs (default: 1)")
    told.add_argument("--gpus-per-node", type=positive(int), help="GPUs of a node (default: 8)")
    told.add_argument("--gpu-memory-gib", type=positive(float), help="memory of a GPU (default: 80)")
    return parser.parse_intermixed_args(arguments)


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument's type: a number above 0."""

    def read(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    read.__name__ = f"number above 0 ({kind.__name__})"
    return read


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known fault is one sentence on stderr, the last line of the command."""
    given = parse(arguments)
    again = shlex.join(["python", "jobs/iterate.py", *arguments])

    def command() -> int:
        overrides = list(given.overrides)
        if given.iterations is not None:
            overrides.append(f"iterations={given.iterations}")
        config = load(given.recipe, overrides)
        root, uri = places(given.run or f"runs/{config.name}", given.work)
        if given.plan:
            from evolve_ray.plan import plan

            text, fault = plan(config, Run(root), cluster_of(given))
            say(text + (f"\n\n{uri} was not asked: `committed` is what stands in {root}" if uri else ""))
            if fault:
                raise fault
            return 0
        return run(config, root, uri, rerun_changed=given.rerun_changed, again=again, verbose=given.verbose)

    return run_command(command, again)


def cluster_of(given: argparse.Namespace) -> Cluster | None:
    """The cluster as the command line tells it, else the GPU nodes of the one that RAY_ADDRESS names."""
    told = (given.nodes, given.gpus_per_node, given.gpu_memory_gib)
    if any(told):
        return Cluster(given.nodes or 1, given.gpus_per_node or 8, given.gpu_memory_gib or 80.0)
    if not os.environ.get("RAY_ADDRESS"):
        return None
    join_ray()
    try:
        return cluster_of_ray()
    finally:
        stop_ray()


def places(name: str, work: str | None) -> tuple[Path, str]:
    """The folder that a run works in, and the URI of the object store that holds what it commits; "" where there is none."""
    if is_uri(name):
        uri, below = check_uri(name)
        return run_folder(work or f"runs/{below}"), uri
    if work:
        raise UserError(f"--work {work}: is for runs of an object store only; give the folder as --run")
    return run_folder(name), ""


def run_folder(name: str) -> Path:
    """A folder on a local or shared file system."""
    url = urlparse(name)
    if url.scheme == "file":
        return Path(url.path).resolve()
    if is_uri(name):
        raise UserError(f"{name}: is in an object store; give a folder on storage that all nodes share")
    return Path(name).resolve()


def run(
    config: Config, root: Path, uri: str = "", *, rerun_changed: bool, again: str = "", verbose: bool = False
) -> int:  # fmt: skip
    """`again` is the command as typed, kept for jobs/status.py and jobs/verify.py."""
    from evolve_ray import inputs, iterate, report
    from evolve_ray.plan import check_space
    from evolve_ray.trackers import Trackers

    started = time.monotonic()
    folder = Run(root)
    tracked = Trackers(config, folder, say)
    with folder.locked(), kept(uri, folder) if uri else contextlib.nullcontext():
        changed = inputs.settle_config(config, folder, rerun_changed=rerun_changed)
        folder.event("driver_start", pid=os.getpid(), job=submission_id(), command=again, folder=os.getcwd())
        say(f"run {config.name} in {root}" + (f", kept in {uri}" if uri else ""))
        follower = Follower(folder, config.name)
        try:
            tracked.start()
            tell, begin = say if verbose else tell_stages, functools.partial(start_ray, config, follower, loud=verbose)
            context = inputs.prepare(config, folder, tell, begin, rerun_changed=rerun_changed, changed=changed)
            context.trackers = tracked
            check_space(config, folder)
            result = iterate.iterate(context)
            tracked.close(failed=False)
        except BaseException as error:
            folder.event("driver_failed", error=f"{type(error).__name__}: {error}"[:2000])
            tracked.close(failed=True)
            raise
        finally:
            follower.stop()
            stop_ray()
        folder.event("driver_end", seconds=round(time.monotonic() - started, 3))
    say("")
    say(report.table(result))
    say(f"\nrun: {uri or root}\nreport: {root / 'report.html'}\ncheckpoint: {result['checkpoint']}")
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def tell_stages(line: str) -> None:
    """Without --verbose: lines below a stage's own, which are indented by four, are not printed. All is in events.jsonl."""
    if not line.startswith("    "):
        say(line)


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
    code = str(Path(__file__).resolve().parents[1])
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
