"""A user's type checker sees what `import jaxops` gives, though each name is imported at its first use only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxops

ROOT = Path(__file__).parents[1]
USER = """\
import jaxops as jx

loaded = jx.load_config("rec/movielens_sasrec", ["run.epochs=2"])
run = jx.fit(jx.build_task(loaded))
reveal_type(run)
reveal_type(jx.Sum.of)
reveal_type(jx.every)
jx.testing.check(jx.build_task(loaded))
jx.fit(3)
jx.fitt(jx.build_task(loaded))
"""


def test_the_typed_names_are_the_lazy_ones():
    tree = ast.parse(Path(jaxops.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(checked.test) == "TYPE_CHECKING"
    typed = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name}: not re-exported without `as {alias.name}`"
            typed[alias.name] = node.module
    assert typed == {**jaxops._NAMES, "testing": "jaxops"}
    assert sorted(typed) == sorted(jaxops.__all__)


def test_every_lazy_name_is_there_and_no_other():
    assert all(getattr(jaxops, name) is not None for name in jaxops.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        jaxops.fitt  # noqa: B018


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "jaxops" / "py.typed").is_file()


@pytest.mark.slow
def test_mypy_of_a_users_project_sees_types_and_mistakes(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "", "--cache-dir", str(tmp_path / "cache"), "user.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and len(lines) == 6, done.stdout + done.stderr
    assert lines[0].endswith('Revealed type is "jaxops.run.summary.FinishedRun"')
    assert "-> jaxops.core.sums.Sum" in lines[1] and "-> jaxops.core.loop.Hook" in lines[2]
    assert lines[3].startswith('user.py:9: error: Argument 1 to "fit" has incompatible type "int"; expected "Task"')
    assert lines[4].startswith('user.py:10: error: Module has no attribute "fitt"')
