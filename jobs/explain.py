"""Shows where a training pair comes from: `python jobs/explain.py RUN PAIR_ID [--json]`.

PAIR_ID is a pair_id in a pairs.parquet of the run, or its first characters. Exit codes as in iterate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evolve_ray.audit.explain import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
