"""The command `jobs/iterate.py`: its arguments, the plan, the lock, Ray, and one clear line if the run ends with an error."""

import argparse
import contextlib
import functools
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.config import describe
from evolve_ray.config.load import load
from evolve_ray.config.options import Config
from evolve_ray.errors import failure, run_command
from evolve_ray.plan.sizing import Cluster, cluster_of_ray
from evolve_ray.pools.session import join_ray, start_ray, stop_ray
from evolve_ray.store.places import places
from evolve_ray.store.run import Run, submission_id
from evolve_ray.store.sync import mirrored
from evolve_ray.watch.metrics import Follower
from evolve_ray.watch.terminal import print_stages, say


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="iterate.py",
        description="Runs the iterations of a recipe. The same command again resumes the run from its committed work.",
    )
    parser.add_argument("recipe", metavar="RECIPE.toml", help="a recipe; the shipped recipes are in jobs/recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options that replace those of the recipe, e.g. training.beta=0.2"
    )
    parser.add_argument("--run", help="the run directory or s3://BUCKET/PREFIX (default: runs/NAME, NAME from the recipe)")
    parser.add_argument("--work", help="the local folder of a run in an object store (default: runs/s3/BUCKET/PREFIX)")
    parser.add_argument("--iterations", type=int, help="number of iterations (default: `iterations` of the recipe)")
    parser.add_argument("--plan", action="store_true", help="print what would run and what it needs, then stop")
    parser.add_argument("--verbose", action="store_true", help="also print shards and steps, not only one line per stage")
    parser.add_argument("--options", nargs="?", action=Options, metavar="TABLE", help="print every option, or those of a table")
    parser.add_argument("--rerun-changed", action="store_true", help="recompute the stages whose options or inputs changed")
    cluster = parser.add_argument_group("the cluster, for --plan (default: the cluster at RAY_ADDRESS)")
    cluster.add_argument("--nodes", type=positive(int), help="number of nodes with GPUs (default: 1)")
    cluster.add_argument("--gpus-per-node", type=positive(int), help="GPUs per node (default: 8)")
    cluster.add_argument("--gpu-memory-gib", type=positive(float), help="memory of one GPU in GiB (default: 80)")
    return parser.parse_intermixed_args(arguments)


class Options(argparse.Action):
    """Prints the options of a recipe and ends the command, like --help."""

    def __call__(self, parser: argparse.ArgumentParser, args: argparse.Namespace, table: Any, flag: str | None = None) -> None:
        def command() -> int:
            say(describe.as_text(table or ""))
            return 0

        sys.exit(run_command(command, "the same command"))


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns a type for argparse that accepts only numbers above 0."""

    def read(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    read.__name__ = f"number above 0 ({kind.__name__})"
    return read


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code; a known error is one line on stderr, the last one."""
    args = parse(arguments)
    command_line = shlex.join(["python", "jobs/iterate.py", *arguments])

    def command() -> int:
        overrides = list(args.overrides)
        if args.iterations is not None:
            overrides.append(f"iterations={args.iterations}")
        config = load(args.recipe, overrides)
        root, uri = places(args.run or f"runs/{config.name}", args.work)
        if args.plan:
            from evolve_ray.inputs.plugs import check_plugs
            from evolve_ray.plan.plan import plan

            check_plugs(config)
            text, error = plan(config, Run(root), cluster_of(args))
            say(text + (f"\n\n{uri} was not read: `committed` shows what is in {root}" if uri else ""))
            if error:
                raise error
            return 0
        return run(config, root, uri, rerun_changed=args.rerun_changed, command_line=command_line, verbose=args.verbose)

    return run_command(command, command_line)


def cluster_of(args: argparse.Namespace) -> Cluster | None:
    """Returns the cluster from the command line, else the GPU nodes of the cluster at RAY_ADDRESS, None without either."""
    if any((args.nodes, args.gpus_per_node, args.gpu_memory_gib)):
        return Cluster(args.nodes or 1, args.gpus_per_node or 8, args.gpu_memory_gib or 80.0)
    if not os.environ.get("RAY_ADDRESS"):
        return None
    join_ray()
    try:
        return cluster_of_ray()
    finally:
        stop_ray()


def run(
    config: Config, root: Path, uri: str = "", *, rerun_changed: bool, command_line: str = "", verbose: bool = False
) -> int:  # fmt: skip
    """Runs a recipe in the folder `root`, mirrored in the object store at `uri` if that is not empty; returns the exit code.

    `command_line` is the command as the user typed it; it is stored in an event for jobs/status.py and jobs/verify.py.
    """
    from evolve_ray import iterate
    from evolve_ray.inputs.plugs import check_plugs
    from evolve_ray.inputs.prepare import prepare, settle_config
    from evolve_ray.plan.plan import check_space
    from evolve_ray.report.tables import table
    from evolve_ray.watch import progress
    from evolve_ray.watch.trackers import Trackers

    started = time.monotonic()
    check_plugs(config)  # before config.json is written: a corrected name must not count as another configuration
    directory = Run(root)
    trackers = Trackers(config, directory, say)
    with directory.locked(), mirrored(uri, directory) if uri else contextlib.nullcontext():
        rerun_changed = rerun_changed or not directory.has_results()
        changed = settle_config(config, directory, rerun_changed=rerun_changed)
        directory.event("driver_start", pid=os.getpid(), job=submission_id(), command=command_line, folder=os.getcwd())
        say(f"run {config.name} in {root}" + (f", mirrored in {uri}" if uri else ""))
        follower = Follower(directory, config.name)
        try:
            trackers.start()
            print_line = say if verbose else print_stages
            join_cluster = functools.partial(start_ray, config, follower, loud=verbose)
            context = prepare(config, directory, print_line, join_cluster, rerun_changed=rerun_changed, changed=changed)
            context.trackers = trackers
            check_space(config, directory)
            with progress.shown(directory, say):
                result = iterate.iterate(context)
            trackers.close(failed=False)
        except BaseException as error:
            directory.event("driver_failed", **failure(error))
            trackers.close(failed=True)
            raise
        finally:
            follower.stop()
            stop_ray()
            shutil.rmtree(directory.ray_train, ignore_errors=True)
        directory.event("driver_end", seconds=round(time.monotonic() - started, 3))
    say("")
    say(table(result))
    say(f"\nrun: {uri or root}\nreport: {root / 'report.html'}\ncheckpoint: {result['checkpoint']}")
    return 0
