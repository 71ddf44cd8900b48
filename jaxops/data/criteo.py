"""Stands in for `jaxops.data.clicks.criteo` under its old name: `python -m jaxops.data.criteo` still writes a log."""

from jaxops.data.clicks.criteo import main, write_criteo

__all__ = ["main", "write_criteo"]

if __name__ == "__main__":
    main()
