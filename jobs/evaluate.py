"""Compares models on the same prompts with the same seeds: `python jobs/evaluate.py MODEL... [--recipe RECIPE.toml]
[--data NAME=FILE_OR_DATASET...] [--probes foreign,keep,...] [--foreign MODEL] [--out DIR] [key=value ...]`.

MODEL is a Hugging Face folder or name, or a run directory: RUN is its last model; RUN@base, RUN@activation and RUN@2 are earlier
ones. The same command again resumes from the committed work. Exit codes as in iterate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in a submitted working directory the package is not installed

from evolve_ray.compare.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
