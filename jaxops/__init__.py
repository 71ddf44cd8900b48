"""jaxops trains recommenders, and models of families of your own, with one functional core on any JAX mesh.

Each public name is imported at its first use, so `import jaxops` is quick and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxops.core.version import VERSION

if TYPE_CHECKING:  # the same names for type checkers and editors, which do not call __getattr__
    from jaxops import testing as testing
    from jaxops.core.failures import RunFailed as RunFailed
    from jaxops.core.failures import UserError as UserError
    from jaxops.core.fresh_state import init_state as init_state
    from jaxops.core.loop import every as every
    from jaxops.core.mesh import make_mesh as make_mesh
    from jaxops.core.mesh import use_cpu_devices as use_cpu_devices
    from jaxops.core.metric import Metric as Metric
    from jaxops.core.random import dropout as dropout
    from jaxops.core.random import example_keys as example_keys
    from jaxops.core.sharding import constrain as constrain
    from jaxops.core.state import State as State
    from jaxops.core.step import build_step as build_step
    from jaxops.core.sums import Max as Max
    from jaxops.core.sums import Sum as Sum
    from jaxops.core.sums import Sums as Sums
    from jaxops.run.build import build_task as build_task
    from jaxops.run.build import load_config as load_config
    from jaxops.run.config import RunConfig as RunConfig
    from jaxops.run.family import Family as Family
    from jaxops.run.fit import fit as fit
    from jaxops.run.load import load as load
    from jaxops.run.task import Measured as Measured
    from jaxops.run.task import Task as Task

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


if not TYPE_CHECKING:  # a type checker that sees it takes every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name == "testing":
            return importlib.import_module("jaxops.testing")
        if name in _NAMES:
            return getattr(importlib.import_module(_NAMES[name]), name)
        raise AttributeError(f"module 'jaxops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
