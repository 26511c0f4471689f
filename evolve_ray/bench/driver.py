"""The command jobs/bench.py: a subcommand for each file of this folder, which has `options(parser)` and `rows(args)`."""

import argparse
import importlib
import json
import os
import shlex
from pathlib import Path

from evolve_ray.bench.table import Row, as_json, as_text
from evolve_ray.errors import run_command
from evolve_ray.pools.session import wait_asleep
from evolve_ray.store.files import write_atomic

COMMANDS = {
    "train": "training steps: trees, memory, TRL",
    "loop": "a whole iteration against the plain script of vLLM, transformers and TRL",
    "generate": "chains against rounds with barriers, and against one flat batch, on vLLM",
    "gpu": "one page about a GPU: an iteration, training steps and reloads at real sizes",
    "iteration": "share of an iteration outside of engines and training",
    "scale": "cost by size, and several engines side by side, without a model",
    "serve": "the endpoint against `vllm serve`, and against a client that refines by itself",
}

# Against what torch, transformers and TRL write beside the rows.
QUIET = {"KINETO_LOG_LEVEL": "99", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known error is one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Measures both sides of a claim in turns.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        subparser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as JSON")
        importlib.import_module(f"evolve_ray.bench.{name}").options(subparser)
    args = parser.parse_args(arguments)

    def command() -> int:
        wait_asleep()
        device = getattr(args, "device", None)
        os.environ.update(QUIET | ({"DS_ACCELERATOR": device} if device else {}) | os.environ)
        rows: list[Row] = importlib.import_module(f"evolve_ray.bench.{args.command}").rows(args)
        print(as_text(rows))
        if args.json:
            write_atomic(args.json, json.dumps([as_json(row) for row in rows], indent=1).encode())
        return 0

    return run_command(command, shlex.join(["python", "jobs/bench.py", *arguments]))
