"""Runs recipes x seeds of the tiny world and reports which claims hold: `python jobs/study.py [--quick] [--seeds 0,1,2]
[--recipes tiny,tiny_iterative_dpo,...] [--out runs/study] [--json FILE] [--only-report]`.

The same command again resumes. The exit code is 0 if the study ran, whether or not the claims hold; otherwise as in iterate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evolve_ray.study.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve().parent))
