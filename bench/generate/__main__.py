"""`python -m bench.generate`."""

import sys

from bench.generate.cli import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
