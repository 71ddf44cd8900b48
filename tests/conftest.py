"""Eight CPU devices, strict promotion, rank promotion raises, warnings are errors (see pyproject)."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _scratch_cache(tmp_path_factory, monkeypatch):
    """Nothing in the suite may write to the user's cache."""
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
