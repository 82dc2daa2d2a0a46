"""`python -m left_bench`."""

import sys

from left_bench.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
