"""What `jaxops.testing` gives a user's own tests: its examples run, and the plugin makes a suite strict."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from toys import init, regression, rows

import jaxops as jx
from jaxops import testing
from jaxops.audit import reference
from jaxops.audit.audit import _OBJECTIVE, _STEPPED

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", [testing, reference], ids=lambda module: module.__name__)
def test_the_examples_of_docstrings_run(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    done = doctest.testmod(module, optionflags=flags)
    assert done.failed == 0 and done.attempted > 5


def test_an_objective_of_ones_own_is_checked_on_one_device():
    found = testing.check_objective(regression, init(None), rows(0, 8))
    assert {one.check for one in found} == {"counts", "sums", "examples", "keys", "gradients", "packing"}
    mean = lambda params, batch, key: {"loss/x": jx.Sum(jnp.mean(batch["x"]) * params["down"]["bias"][0], jnp.ones(()))}
    with pytest.raises(AssertionError) as caught:
        testing.check_objective(mean, init(None), rows(0, 8))
    text = str(caught.value).splitlines()
    assert text[0].startswith("FAILED  sums") and any(line.startswith("FAILED  gradients") for line in text)


def test_invariance_without_a_task():
    (found,) = testing.check_invariance(regression, init(None), rows(0, 8), layouts=[{"data": 2}], accumulations=[2])
    assert found.gradient <= 1e-6 and found.layout == {"data": 2}

    def mean(params, batch, key):
        entry = regression(params, batch, key)["loss/mse"]
        return {"loss/mse": jx.Sum(entry.total / entry.count, jnp.ones(()))}

    with pytest.raises(AssertionError, match="depends on the layout"):
        testing.check_invariance(mean, init(None), rows(0, 8), layouts=[{"data": 2}], accumulations=[2])


def test_sharded_parameters_of_ones_own():
    with pytest.raises(jx.UserError, match="up/kernel"):
        testing.check_invariance(
            regression,
            init(None),
            rows(0, 16),
            layouts=[{"fsdp": 2}],
            rules=[("kernel$", ("fsdp",)), ("", ())],
        )
    assert np.isfinite(init(None)["up"]["kernel"]).all()


def test_the_page_names_what_is_there():
    names = set(re.findall(r"jx\.testing\.(\w+)", (ROOT / "docs" / "audit.md").read_text()))
    assert names >= {"check", "audit", "reference"} and all(hasattr(testing, name) for name in names)
    page = (ROOT / "docs" / "audit.md").read_text()
    listed = re.search(r"compare with: (.*?)\.$", page, re.S | re.M)
    assert listed is not None
    for name in re.findall(r"`(\w+)`", listed[1]):
        assert callable(getattr(reference, name))
    checks = set(re.findall(r"^\| `([a-z ]+)` \|", page, re.M))
    assert checks == {*_OBJECTIVE, *_STEPPED, *PROGRAMS}


PROGRAMS = {"fence", "promotions", "host", "types", "donation", "replicated", "collectives"}
SUITE = """
import jax, jax.numpy as jnp, numpy as np, pytest, warnings

def test_devices(cpu_mesh):
    assert len(jax.devices()) == 8 and cpu_mesh(data=2, fsdp=4).shape["fsdp"] == 4

def test_promotion():
    with pytest.raises(Exception, match="promotion"):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)

def test_rank():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)

def test_warning():
    with pytest.raises(UserWarning):
        warnings.warn("careful", stacklevel=1)

def test_no_leaks(no_leaks):
    kept = []
    with pytest.raises(Exception, match="[Ll]eak"):
        jax.jit(lambda x: kept.append(x))(1.0)
"""


@pytest.mark.slow
def test_the_plugin_makes_a_suite_strict(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["jaxops.audit.pytest_plugin"]\n')
    (tmp_path / "test_mine.py").write_text(SUITE)

    def ran(*options):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "test_mine.py"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        return done.stdout

    assert "5 passed" in ran(), ran()
    loose = ran("-o", "jaxops_strict=false", "-o", "jaxops_devices=2")
    assert "1 passed" in loose and "4 failed" in loose
