"""Eight CPU devices, strict promotion, rank promotion raises, annotations checked, warnings are errors (pyproject)."""

import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAXOPS_STATE"] = tempfile.mkdtemp(prefix="jaxops-state-")  # what the suite trains is nobody's own
os.environ.setdefault("NPROC", "16")  # threads enough for eight devices to meet: see core.mesh.use_cpu_devices
if "XLA_FLAGS" not in os.environ:
    # The suite compiles hundreds of tiny programs and runs each a few times: a quarter of the compile time.
    # Only where the flags are known to exist: XLA ends the process at one it does not know.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        # Not cut into fewer parts too, though that compiles faster: sums are then rounded otherwise.
        flags += " --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = flags
    elif importlib.metadata.version("jaxlib").startswith("0.12."):
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

# What was compiled once is read the next time, by child processes too: a third of a warm run. CI starts with nothing.
if "CI" in os.environ:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["JAXOPS_STATE"])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".compiled-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook
from markupsafe import Markup

# Ranks, dtypes and types of annotated functions are checked at every call, in the rooms that are about arrays.
install_import_hook(
    ["jaxops.models", "jaxops.objectives", "jaxops.evaluate", "jaxops.core.random"], "beartype.beartype"
)

# A busy machine is no failure of the code: neither the time of an example nor the time to make it fails a test.
hypothesis.settings.register_profile("jaxops", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("jaxops")

# Traced programs are millions of long-lived objects: collected at Python's own pace they cost a twentieth of the suite.
gc.set_threshold(50_000, 20, 20)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# A run draws a dozen pictures at its end, a third of its time here: where no test looks at them, none is drawn.
_BLANK = Markup('<svg viewBox="0 0 1 1" role="img" aria-label="{}"></svg>')


def pytest_unconfigure():
    shutil.rmtree(os.environ["JAXOPS_STATE"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _blank_pictures(request):
    """Of a module, so that the runs that its tests share have none either."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("pictures") is None:
            blank = lambda draw, title, alt: _BLANK.format(f"{title}: {alt}")
            patch.setattr("jaxops.report.figures.picture", blank)
        yield


@pytest.fixture(autouse=True)
def _scratch_cache(tmp_path_factory, monkeypatch):
    """Nothing in the suite may write to the user's cache."""
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
