"""Where a run stands: `python jobs/status.py RUN [--json]`; reads the run directory only, from any machine that sees it.

Running, finished, failed or dead; iteration, stage, shards, step and loss; tokens a second; rejected rows; the last decision and
error; the next command. Exit code 0 whatever the state is, 2 where there is no run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evolve_ray.watch.status import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
