"""The command of jobs/bench.py: one subcommand a file of this folder, each with `options(parser)` and `rows(given)`."""

import argparse
import importlib
import json
import shlex
from pathlib import Path

from evolve_ray.bench.table import Row, as_json, as_text
from evolve_ray.errors import run_command
from evolve_ray.store.files import write_atomic

COMMANDS = {
    "train": "training steps: trees, memory, TRL",
    "generate": "chains against rounds with barriers and against one flat batch, on vLLM",
    "iteration": "the share of an iteration outside of engines and training",
    "scale": "cost against size, and engines side by side, without a model",
}


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known fault is one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Measures both sides of a claim in turns.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in COMMANDS.items():
        own = commands.add_parser(name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        own.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
        importlib.import_module(f"evolve_ray.bench.{name}").options(own)
    given = parser.parse_args(arguments)

    def command() -> int:
        made: list[Row] = importlib.import_module(f"evolve_ray.bench.{given.command}").rows(given)
        print(as_text(made))
        if given.json:
            write_atomic(given.json, json.dumps([as_json(row) for row in made], indent=1).encode())
        return 0

    return run_command(command, shlex.join(["python", "jobs/bench.py", *arguments]))
