"""Rewrites the report page of a run, or compares several runs: `python jobs/report.py RUN [RUN ...] [--html FILE] [--json FILE]`.

For several runs, it prints one table, and writes one page with --html, that compare their models on the evaluation splits that
all runs have. Runs whose splits of the same name have different held-out prompts are refused. Exit codes as in iterate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in a submitted working directory the package is not installed

from evolve_ray.report.runs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
