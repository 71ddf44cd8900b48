"""`python -m jaxops` and `jaxops --version`: neither waits for jax."""

import importlib.metadata
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxops
from jaxops.cli.main import main

pytestmark = pytest.mark.latest


def as_module(*argv: str) -> subprocess.CompletedProcess[str]:
    """`python -m jaxops ARGV`, which tells on stderr whether it has imported jax, and its own name."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('jax' in sys.modules, sys.argv[0], file=sys.stderr))\n"
        f"sys.argv = ['there/jaxops/__main__.py', *{list(argv)!r}]\n"
        "runpy.run_module('jaxops', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_the_version_is_one_line_of_what_a_bug_report_needs(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    jax, python = importlib.metadata.version("jax"), platform.python_version()
    said = f"jaxops {jaxops.__version__}, jax {jax}, python {python}, {platform.platform()}\n"
    assert capsys.readouterr().out == said


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert jaxops.__version__ == project["project"]["version"]


def test_the_version_is_told_where_jax_is_missing(capsys, monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert ", jax not installed, " in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "said"), [("--version", "jaxops 0."), ("--help", "usage: jaxops ")])
def test_the_module_is_the_command_and_answers_without_jax(flag, said):
    done = as_module(flag)
    assert done.returncode == 0 and done.stdout.startswith(said)
    assert done.stderr == "False jaxops\n"


def test_the_module_gives_the_exit_status_of_the_command():
    done = as_module("trian")
    assert done.returncode == 2 and "did you mean 'train'?" in done.stderr
