"""A pytest plugin that makes a suite strict: eight CPU devices, no silent promotion, and warnings are errors.

In the `conftest.py` of a project: `pytest_plugins = ["jaxops.audit.pytest_plugin"]`, and nothing else. The options
`jaxops_devices` and `jaxops_strict` of pytest's ini-file change the number of devices, or keep the devices alone.
Tested in tests/audit/test_pytest_plugin.py.
"""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import jax


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the ini-file."""
    parser.addini("jaxops_devices", "the number of virtual CPU devices", default="8")
    parser.addini("jaxops_strict", "strict promotion, and warnings are errors", type="bool", default=True)


def pytest_configure(config: pytest.Config) -> None:
    """Chooses virtual CPU devices before anything uses a backend, and makes jax and warnings strict."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from jaxops.core.mesh import use_cpu_devices

    jax.config.update("jax_platforms", "cpu")
    use_cpu_devices(int(config.getini("jaxops_devices")))
    if config.getini("jaxops_strict"):
        config.addinivalue_line("filterwarnings", "error")
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def cpu_mesh() -> Callable[..., "jax.sharding.Mesh"]:
    """A function that makes a mesh over as many CPU devices as its sizes multiply to: `cpu_mesh(data=2, fsdp=4)`."""
    from jaxops.audit.layouts import mesh_of

    return lambda **sizes: mesh_of(sizes)


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Raises where a test lets a tracer out of the function that is traced (`jax.checking_leaks`); it is slow."""
    import jax

    with jax.checking_leaks():
        yield
