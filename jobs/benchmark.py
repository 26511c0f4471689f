"""AlpacaEval 2 or Arena-Hard on what `jobs/evaluate.py` generated: `python jobs/benchmark.py alpaca_eval|arena_hard EVALUATION
--reference FILE --judge MODEL --judge-url URL [--api-key-env NAME] [--out DIR] [--concurrency N] ...`.

EVALUATION is an output folder of jobs/evaluate.py; every model and round of it is judged against the reference by any server
that speaks the OpenAI protocol. The same command again continues. Exit codes as in iterate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evolve_ray.benchmarks.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
