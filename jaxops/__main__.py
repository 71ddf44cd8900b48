"""`python -m jaxops` is the command `jaxops`, for where the console script is not on the path."""

import sys

from jaxops.cli.main import script

if __name__ == "__main__":
    sys.argv[0] = "jaxops"  # what a run records as its command
    script()
