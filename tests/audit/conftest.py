"""A folder with data, config and a package of one's own, for audits by import path."""

from tiny_runs import folder  # noqa: F401 (fixture)
