"""The command jobs/serve.py: arguments, the plan, Ray and Serve, and the end of both with all requests answered."""

import argparse
import logging
import os
import shlex
import shutil
import threading
from typing import Any

from evolve_ray.errors import ResourceError, UserError, run_command
from evolve_ray.serve.deploy import APP, NODE_ENV, application, metrics_folder
from evolve_ray.serve.settings import Settings, check_host, describe, read_keys, settings_of
from evolve_ray.watch.terminal import say

POLL_S = 2.0
# Ray runs its workers at a lower priority than other programs, which is right for training beside a desktop; here it would only
# make clients on the same machine wait.
LOCAL_ENV = {"RAY_worker_niceness": "0"}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve.py",
        description="Serves a model behind OpenAI's protocol; its answers are refined before they are given.",
    )
    parser.add_argument(
        "model", metavar="MODEL_OR_RUN",
        help="a Hugging Face folder or name, or a run directory: RUN is its last model, RUN@base, RUN@activation, RUN@2 others",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace those of the recipe")
    parser.add_argument(
        "--recipe",
        help="the recipe that sets template, strategy, sampling, engine, scorer, verifier (default: the config.json of the run)",
    )
    parser.add_argument("--name", help="the model's name for clients (default: RUN@CHECKPOINT, or the name of the folder)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="the port (default: %(default)s)")
    parser.add_argument(
        "--api-key-env", action="append", default=[], metavar="NAME",
        help="an environment variable that holds one or more keys, of which a client must send one; may be given several times; "
        "needed for every --host but loopback",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print what would start, then stop")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known error is one sentence, the last line on stderr."""
    args = parse(arguments)

    def command() -> int:
        if not 1 <= args.port <= 65535:
            raise UserError(f"--port: is {args.port}, but must be from 1 to 65535")
        keys = read_keys(args.api_key_env)
        check_host(args.host, keys)
        settings = settings_of(args.model, args.recipe, args.overrides, args.name, keys)
        if args.plan:
            say(describe(settings, args.host, args.port))
            return 0
        return run(settings, args.host, args.port)

    return run_command(command, shlex.join(["python", "jobs/serve.py", *arguments]))


def run(settings: Settings, host: str, port: int) -> int:
    """Serves until SIGTERM or an interrupt, then lets running requests finish; returns the exit code."""
    from evolve_ray.pools.session import start_ray, stop_ray

    prepare_node()
    say(f"starting {settings.name}: Ray, Serve and {settings.config.serve.replicas} engines (half a minute or more)")
    try:
        start_ray(settings.config)
        from ray import serve

        try:
            deploy(application(settings), host, port)
            say(f"serving {settings.name}\n  page http://{host}:{port}/\n  API  http://{host}:{port}/v1\nend it with Ctrl-C")
            watch()
        except KeyboardInterrupt:
            say(f"ending: running requests may take {settings.config.serve.drain_s:g} s to finish")
        serve.delete(APP)
        if os.environ.get("RAY_ADDRESS") and not serve.status().applications:
            serve.shutdown()  # a local Ray ends with this process; on a cluster, Serve may serve others
        return 0
    finally:
        stop_ray()
        shutil.rmtree(metrics_folder(), ignore_errors=True)


def prepare_node() -> None:
    """Sets what a local Ray needs from its start; the nodes of a cluster have it from where Ray was started."""
    os.environ.update({**NODE_ENV, **LOCAL_ENV})


def deploy(app: Any, host: str, port: int) -> None:
    """Starts an application; returns when it answers. Raises ResourceError or UserError with the reason if it cannot start."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        http_options=HTTPOptions(host=host, port=port), logging_config={"enable_access_log": False, "log_level": "WARNING"}
    )
    try:
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError:
        raise start_error() from None


def start_error() -> Exception:
    """The reason why the application did not start, out of Serve's messages with the traceback of a replica."""
    from ray import serve

    application = serve.status().applications[APP]
    messages = [application.message, *(part.message for part in application.deployments.values())]
    return reason_of("\n".join(messages))


def reason_of(message: str) -> Exception:
    """The error behind a traceback: the last of our own, else the last that Python named."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        kind, _, text = line.partition(": ")
        if kind.endswith("UserError"):
            return UserError(text)
    reasons = [line for line in lines if ": " in line and line.partition(": ")[0].endswith(("Error", "Exception", "Exit"))]
    return ResourceError(
        f"serve: the model did not start: {(reasons or lines or ['no reason was given'])[-1]}; see the Ray dashboard"
    )


def watch() -> None:
    """Returns never while the application runs; raises ResourceError when it has failed for good."""
    from ray import serve

    while True:
        threading.Event().wait(POLL_S)
        status = serve.status().applications.get(APP)
        if status is None:
            raise ResourceError(f"serve: the application {APP!r} was deleted by someone else; start it again")
        if status.status == "DEPLOY_FAILED":
            raise start_error()
