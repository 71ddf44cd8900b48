"""Compiles are counted by name, and those after the warm-up are told apart."""

import jax
import jax.numpy as jnp
import pytest

from jaxops.core.compiles import Compiles, enable_compilation_cache

pytestmark = pytest.mark.latest


def test_compiles_are_counted_and_repeats_named():
    @jax.jit
    def doubled(x):
        return 2 * x

    @jax.jit
    def halved(x):
        return x / 2

    said = []
    compiles = Compiles(said.append)
    inputs = [jnp.ones(n) for n in (2, 3, 4)]
    assert compiles.again(["doubled"]) == {}
    with compiles.watching():
        doubled(inputs[0])
        doubled(inputs[0])
        assert compiles.count["doubled"] == 1 and compiles.seconds > 0
        compiles.warm()
        halved(inputs[0])
        assert compiles.again(["doubled", "halved"]) == {}  # halved is new: its first compile is no repeat
        doubled(inputs[1])
        doubled(inputs[2])
        assert compiles.again(["doubled", "halved"]) == {"doubled": 2}
    doubled(jnp.ones((2, 2)))
    assert compiles.count["doubled"] == 3
    assert [name for name in said if name in ("doubled", "halved")] == ["doubled", "halved", "doubled", "doubled"]


def test_compiled_programs_are_kept_in_the_cache_folder(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path))
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")
        jax.config.update("jax_compilation_cache_dir", "mine")
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "mine"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
