"""The examination of this machine: versions, backend, devices, memory, folders, and what is wrong with them."""

import glob
import importlib.metadata
import os
import platform
import shutil
from typing import Any

from jaxops.core.cache import cache_root

PACKAGES = ("jaxops", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy")


def examine() -> dict[str, Any]:
    """Returns {"facts": {name: value}, "problems": [sentence, ...]}; it never raises."""
    facts: dict[str, str] = {"python": platform.python_version()}
    problems: list[str] = []
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "missing"
            problems.append(f"{name} is not installed: run make install")
    _devices(facts, problems)
    facts["data cache"] = str(cache_root())
    facts["compilation cache"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_root() / "xla")
    existing = next(parent for parent in _parents(facts["data cache"]) if os.path.exists(parent))
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        problems.append(f"the cache {facts['data cache']} cannot be written to: set JAXOPS_CACHE to another folder")
    try:
        free = shutil.disk_usage(".").free / 2**30
    except OSError as error:
        problems.append(f"the current folder cannot be looked at: {error}")
        return {"facts": facts, "problems": problems}
    facts["free disk here"] = f"{free:.1f} GiB"
    if free < 2:
        problems.append(f"only {free:.1f} GiB of disk are free here: checkpoints may not fit")
    return {"facts": facts, "problems": problems}


def _devices(facts: dict[str, str], problems: list[str]) -> None:
    present = accelerators()
    facts["accelerators seen"] = ", ".join(present) or "none"
    try:
        import jax

        devices = jax.devices()
    except Exception as error:
        problems.append(f"jax finds no backend: {error}")
        return
    facts["backend"] = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    if memory:
        facts["memory a device"] = f"{memory / 2**30:.1f} GiB"
    facts["processes"] = f"{jax.process_count()}"
    if present and devices[0].platform == "cpu":
        extra = "tpu" if "TPU" in present else "cuda"
        problems.append(f"{present[0]} is here, but jax runs on the CPU: run make install ACCEL={extra}")


def accelerators() -> list[str]:
    """Returns the accelerators whose device files exist on this machine, whatever jax sees."""
    found = []
    if glob.glob("/dev/accel*") or os.environ.get("TPU_ACCELERATOR_TYPE"):
        found.append("TPU")
    if glob.glob("/dev/nvidia[0-9]*") or shutil.which("nvidia-smi"):
        found.append("NVIDIA GPU")
    return found


def _parents(path: str) -> list[str]:
    out = [os.path.abspath(path)]
    while os.path.dirname(out[-1]) != out[-1]:
        out.append(os.path.dirname(out[-1]))
    return out
