"""`python -m bench.quality`."""

import sys

from bench.quality.cli import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
