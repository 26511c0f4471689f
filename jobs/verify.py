"""Verifies a run: `python jobs/verify.py RUN`.

Checks every committed file and row, and prints what to do. Exit codes: 0 sound, 2 no run, 4 damaged.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evolve_ray.audit.verify import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
