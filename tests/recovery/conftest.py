"""A folder with data, config and a package of one's own."""

from tiny_runs import folder  # noqa: F401 (a fixture)
