"""jaxops trains recommenders, and models of families of your own, with one functional core on any JAX mesh.

Each public name is imported at its first use, so `import jaxops` is quick and touches no device.
"""

import importlib
from typing import Any

from jaxops.core.version import VERSION

_NAMES = {
    "Sum": "jaxops.core.sums",
    "Max": "jaxops.core.sums",
    "Sums": "jaxops.core.sums",
    "constrain": "jaxops.core.sharding",
    "dropout": "jaxops.core.random",
    "every": "jaxops.core.loop",
    "example_keys": "jaxops.core.random",
    "make_mesh": "jaxops.core.mesh",
    "use_cpu_devices": "jaxops.core.mesh",
    "State": "jaxops.core.state",
    "build_step": "jaxops.core.step",
    "init_state": "jaxops.core.fresh_state",
    "Metric": "jaxops.core.metric",
    "RunConfig": "jaxops.run.config",
    "Family": "jaxops.run.family",
    "Task": "jaxops.run.task",
    "Measured": "jaxops.run.task",
    "build_task": "jaxops.run.build",
    "load_config": "jaxops.run.build",
    "fit": "jaxops.run.fit",
    "load": "jaxops.run.load",
    "UserError": "jaxops.core.failures",
    "RunFailed": "jaxops.core.failures",
}

__all__ = [*_NAMES, "testing"]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("jaxops.testing")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'jaxops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
