"""Shows what a recipe would do with its data: `python jobs/preview.py RECIPE [key=value ...]`. No Ray, no engine, no GPU.

It shows what is asked in each round, with special tokens and ids, which tokens are trained, lengths, dropped rows and warnings.
Exit codes as in iterate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evolve_ray.preview.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
