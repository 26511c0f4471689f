"""Serves a model with refinement: `python jobs/serve.py MODEL_OR_RUN[@CHECKPOINT] [--recipe RECIPE.toml] [--host 127.0.0.1]
[--port 8000] [--api-key-env NAME] [--plan] [key=value ...]`.

The endpoint speaks OpenAI's protocol at /v1 and has a page at /. It runs until Ctrl-C or SIGTERM. Exit codes as in iterate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in a submitted working directory the package is not installed

from evolve_ray.serve.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
