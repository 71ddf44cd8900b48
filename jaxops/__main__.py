"""`python -m jaxops` is the command `jaxops`, for where the console script is not on the path."""

from jaxops.cli.main import script

if __name__ == "__main__":
    script()
