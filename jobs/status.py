"""Shows the state of a run: `python jobs/status.py RUN [--json]`. It reads only the run directory, on any machine that has it.

It prints: running, finished, failed or dead; iteration, stage, shards, step and loss; tokens per second; rejected rows; the last
decision and error; the next command. The exit code is 0 in every state, 2 if there is no run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evolve_ray.watch.status import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
