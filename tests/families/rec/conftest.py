"""A folder with data, config and a package of one's own; a finished run."""

from tiny_runs import finished, folder, no_report  # noqa: F401 (fixtures)
