"""Whoever follows the quickstart word by word gets what it says: every block is run in order, in an empty folder."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT, blocks, commands, file_name

PAGE = [block for block in blocks("bash", "python", "yaml") if block.page == "quickstart.md"]


@pytest.mark.slow
def test_the_quickstart(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # one device, as a newcomer has
    printed = ""
    for block in PAGE:
        if block.language != "bash":
            name = file_name(block)
            assert name, f"{block}: the first line must name the file that it goes into"
            Path(tmp_path, name).write_text(block.text)
            continue
        for program, *words in commands(block):
            if program == "make":  # the environment is that of the tests
                continue
            argv = [sys.executable, *(["-m", "jaxops"] if program == "jaxops" else []), *words]
            done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}: {shlex.join([program, *words])}\n{done.stderr[-3000:]}"
            printed += done.stdout + done.stderr
    assert (tmp_path / "runs" / "first" / "report.html").is_file() and (tmp_path / "vectors.parquet").is_file()
    assert "nothing to do" in printed and "'rank': 1" in printed


def test_every_file_of_the_page_is_named():
    assert [file_name(block) for block in PAGE if block.language != "bash"] == [
        "make_plays.py",
        "mine.yaml",
        "recommend.py",
        "losses.py",
    ]
