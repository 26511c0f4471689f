"""Runs a recipe: `python jobs/iterate.py RECIPE.toml [--run DIR] [--iterations N] [--plan] [key=value ...]`.

Also: `ray job submit --working-dir . -- python jobs/iterate.py RECIPE.toml --run DIR`. The same command again resumes the run
from its committed work. Exit codes: 0 done, 2 input, 3 locked, 4 integrity, 5 resources, 6 numerics, 7 stalled.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in a submitted working directory the package is not installed

from evolve_ray.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
