"""`jaxops` as a process of its own, for tests that stop or kill one."""

import sys

CODE = """
import pathlib, sys, types
# the report's plots take a third of a process's time here; tests/report looks at them
sys.modules["jaxops.report.page"] = types.SimpleNamespace(write_report=lambda run: pathlib.Path(run) / "report.html")
from jaxops.cli.main import script
sys.argv[0] = "jaxops"
script()
"""
COMMAND = [sys.executable, "-c", CODE]
"""`jaxops` without its report."""
