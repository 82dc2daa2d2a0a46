"""`python -m left_bench`."""

import sys

from left_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
