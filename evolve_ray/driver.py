"""The command around a run: arguments, plan, lock, Ray, and one sentence at the end if something is wrong."""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

from evolve_ray import config as options
from evolve_ray.errors import ResourceError, UserError, first_line, on_sigterm, run_command
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
    parser.add_argument("--run", help="the run directory (default: runs/NAME, NAME from the recipe)")
    parser.add_argument("--iterations", type=int, help="how many iterations (the recipe's `iterations`)")
    parser.add_argument("--plan", action="store_true", help="print what would run and what it would take, then stop")
    parser.add_argument("--rerun-changed", action="store_true", help="compute again the stages whose options or inputs changed")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known fault is one sentence on stderr, the last line of the command."""
    given = parse(arguments)
    again = shlex.join(["python", "jobs/iterate.py", *arguments])

    def command() -> int:
        overrides = list(given.overrides)
        if given.iterations is not None:
            overrides.append(f"iterations={given.iterations}")
        config = options.load(given.recipe, overrides)
        root = run_folder(given.run or f"runs/{config.name}")
        if given.plan:
            from evolve_ray.plan import plan

            print(plan(config, Run(root)))
            return 0
        return run(config, root, again, rerun_changed=given.rerun_changed)

    return run_command(command, again)


def run_folder(name: str) -> Path:
    """The run directory; today a local or shared file system."""
    url = urlparse(name)
    if url.scheme == "file":
        return Path(url.path).resolve()
    if "://" in name:
        raise UserError(f"--run {name}: {url.scheme}:// is not supported yet; give a folder on storage that all nodes share")
    return Path(name).resolve()


def run(config: options.Config, root: Path, again: str, *, rerun_changed: bool) -> int:
    from evolve_ray import inputs, iterate, report
    from evolve_ray.plan import check_space

    started = time.monotonic()
    folder = Run(root)
    with folder.locked():
        inputs.settle_config(config, folder, rerun_changed=rerun_changed)
        folder.event("driver_start", pid=os.getpid(), job=submission_id(), command=again, folder=os.getcwd())
        say(f"run {config.name} in {root}")
        try:
            context = inputs.prepare(config, folder, say, lambda: start_ray(config), rerun_changed=rerun_changed)
            check_space(config, folder)
            result = iterate.iterate(context)
        except BaseException as error:
            folder.event("driver_failed", error=f"{type(error).__name__}: {error}"[:2000])
            raise
        finally:
            stop_ray()
        folder.event("driver_end", seconds=round(time.monotonic() - started, 3))
    say("")
    say(report.table(result))
    say(f"\nrun: {root}\nreport: {root / 'report.html'}\ncheckpoint: {result['checkpoint']}")
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def start_ray(config: options.Config) -> None:
    """Joins the cluster that RAY_ADDRESS names (a submitted job has it), else starts a local Ray that ends with the driver."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Worker groups that load torch on busy machines need more than Ray's default of 30 s.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    code = str(Path(__file__).resolve().parents[1])
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))}}
    where = os.environ.get("RAY_ADDRESS")
    local = {
        "address": "local",
        "num_cpus": config.ray.num_cpus or None,
        "object_store_memory": config.ray.object_store_mib << 20,
        "include_dashboard": config.ray.dashboard,
        "runtime_env": environment,
    }
    try:
        ray.init(log_to_driver=False, logging_level="warning", **({} if where else local))
    except Exception as error:  # Ray raises a dozen kinds, and a bare Exception when a busy machine is too slow for it
        what = f"the cluster at RAY_ADDRESS {where} cannot be joined" if where else "a local Ray cannot be started"
        raise ResourceError(f"ray: {what}: {first_line(error)}; nothing is lost: submit the same command again") from None
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, on_sigterm)  # which Ray has taken over


def stop_ray() -> None:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
