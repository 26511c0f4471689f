"""Runs AlpacaEval 2 or Arena-Hard on the output of jobs/evaluate.py: `python jobs/benchmark.py alpaca_eval|arena_hard EVALUATION
--reference FILE --judge MODEL --judge-url URL [--api-key-env NAME] [--out DIR] [--concurrency N] ...`.

EVALUATION is an output folder of jobs/evaluate.py. The judge, any server with the OpenAI API, compares every model and round in
it with the reference. The same command again resumes. Exit codes as in iterate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evolve_ray.benchmarks.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
