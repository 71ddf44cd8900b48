"""Runs without the report, which takes half of a tiny run's time."""

from tiny_runs import no_report  # noqa: F401 (a fixture)
