"""Rewrites a run's page, or compares several runs: `python jobs/report.py RUN [RUN ...] [--html FILE] [--json FILE]`.

Several runs: one table, and with --html one page, of their models side by side on the splits that they share. Runs that ask
other held-out prompts in a split of the same name are refused. Exit codes as in iterate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a submitted working directory is not installed

from evolve_ray.report.runs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
