"""The command `jobs/preview.py RECIPE`: its arguments, and where the preview is written."""

import argparse
import json
import os
import shlex
from pathlib import Path

from evolve_ray.config.load import load
from evolve_ray.errors import UserError, run_command
from evolve_ray.store.files import write_atomic
from evolve_ray.store.run import Run
from evolve_ray.watch.terminal import say


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="preview.py",
        description="Shows what a recipe would do with its data: what is asked and trained, lengths, dropped rows, warnings.",
    )
    parser.add_argument("recipe", metavar="RECIPE.toml", help="a recipe; the shipped recipes are in jobs/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace those of the recipe")
    parser.add_argument("--prompts", type=int, default=3, metavar="N", help="prompts that are shown (default: 3)")
    parser.add_argument("--scorer", action="store_true", help="also score chosen and rejected answers; loads the reward model")
    parser.add_argument("--html", metavar="FILE", help="write a page; it loads nothing and runs no script")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    parser.add_argument("--run", help="the run directory beside which the tiny world is (default: runs/NAME)")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known error is one sentence, the last line on stderr."""
    args = parse(arguments)

    def command() -> int:
        if args.prompts < 1:
            raise UserError(f"--prompts {args.prompts}: must be at least 1")
        config = load(args.recipe, args.overrides)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a prompt beyond the model's length is reported here
        from evolve_ray.preview.collect import Preview
        from evolve_ray.preview.text import text

        run = Run(Path(args.run or f"runs/{config.name}").absolute())
        content = Preview(config, run, args.prompts, say).collect(scorer=args.scorer)
        if args.html:
            from evolve_ray.preview.page import page

            write(args.html, page(content))
        if args.json:
            write(args.json, json.dumps(content, indent=1, ensure_ascii=False))
        say(text(content))
        if content["faults"]:
            raise UserError("; and ".join(content["faults"]))
        return 0

    return run_command(command, shlex.join(["python", "jobs/preview.py", *arguments]))


def write(path: str, value: str) -> None:
    try:
        write_atomic(Path(path), value.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another file") from None
