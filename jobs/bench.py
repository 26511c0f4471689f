"""Measures the speed of this package: `python jobs/bench.py train|generate|loop|serve|gpu|iteration|scale [--json FILE]`.

If two variants are compared, they run in turns, so that other load on the machine affects both. Sizes are options;
see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evolve_ray.bench.driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
