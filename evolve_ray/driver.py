"""The command around a run: arguments, plan, lock, Ray, and one sentence at the end if something is wrong."""

import argparse
import contextlib
import functools
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.config import describe
from evolve_ray.config.load import load
from evolve_ray.config.options import Config
from evolve_ray.errors import run_command
from evolve_ray.plan.sizing import Cluster, cluster_of_ray
from evolve_ray.pools.session import join_ray, start_ray, stop_ray
from evolve_ray.store.places import places
from evolve_ray.store.run import Run, submission_id
from evolve_ray.store.sync import mirrored
from evolve_ray.watch.metrics import Follower
from evolve_ray.watch.terminal import print_stages, say


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
    parser.add_argument("--options", nargs="?", action=Options, metavar="TABLE", help="print every option, or those of a table")
    parser.add_argument("--rerun-changed", action="store_true", help="compute again the stages whose options or inputs changed")
    told = parser.add_argument_group("the cluster, for --plan (without these: the one that RAY_ADDRESS names)")
    told.add_argument("--nodes", type=positive(int), help="nodes with GPUs (default: 1)")
    told.add_argument("--gpus-per-node", type=positive(int), help="GPUs of a node (default: 8)")
    told.add_argument("--gpu-memory-gib", type=positive(float), help="memory of a GPU (default: 80)")
    return parser.parse_intermixed_args(arguments)


class Options(argparse.Action):
    """Prints options and ends the command, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, given: argparse.Namespace, table: Any, name: str | None = None) -> None:
        def command() -> int:
            say(describe.as_text(table or ""))
            return 0

        sys.exit(run_command(command, "the same command"))


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
            from evolve_ray.plan.plan import plan

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


def run(
    config: Config, root: Path, uri: str = "", *, rerun_changed: bool, again: str = "", verbose: bool = False
) -> int:  # fmt: skip
    """`again` is the command as typed, kept for jobs/status.py and jobs/verify.py."""
    from evolve_ray import iterate
    from evolve_ray.inputs.prepare import prepare, settle_config
    from evolve_ray.plan.plan import check_space
    from evolve_ray.report.tables import table
    from evolve_ray.watch.trackers import Trackers

    started = time.monotonic()
    folder = Run(root)
    tracked = Trackers(config, folder, say)
    with folder.locked(), mirrored(uri, folder) if uri else contextlib.nullcontext():
        changed = settle_config(config, folder, rerun_changed=rerun_changed)
        folder.event("driver_start", pid=os.getpid(), job=submission_id(), command=again, folder=os.getcwd())
        say(f"run {config.name} in {root}" + (f", kept in {uri}" if uri else ""))
        follower = Follower(folder, config.name)
        try:
            tracked.start()
            tell, join = say if verbose else print_stages, functools.partial(start_ray, config, follower, loud=verbose)
            context = prepare(config, folder, tell, join, rerun_changed=rerun_changed, changed=changed)
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
    say(table(result))
    say(f"\nrun: {uri or root}\nreport: {root / 'report.html'}\ncheckpoint: {result['checkpoint']}")
    return 0
