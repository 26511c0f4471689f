"""Models side by side on the same prompts with the same seeds: `python jobs/evaluate.py MODEL... [--recipe RECIPE.toml]
[--data NAME=FILE_OR_DATASET...] [--probes foreign,keep,...] [--foreign MODEL] [--out DIR] [key=value ...]`.

MODEL is a Hugging Face folder or name, or a run directory: RUN is its last model, RUN@base, RUN@activation, RUN@2 earlier
ones. The same command again continues from what is committed. Exit codes as in iterate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a submitted working directory is not installed

from evolve_ray.compare.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
