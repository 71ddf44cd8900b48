"""A launch as a job of Ray: the command that submits it, and its runtime environment. jaxops runs neither.

Ray starts the driver `launch/ray_driver.py`, which runs one worker on each host. Ray does not try a job again, and has
no limit in hours: the driver keeps both. Tested in tests/launch/test_rendered.py.
"""

import json
import shlex
from typing import Any

from jaxops.launch.accelerators import find_accelerator
from jaxops.launch.record import LaunchRecord
from jaxops.launch.render.lines import train_line
from jaxops.launch.scripts import script


def runtime_env(record: LaunchRecord) -> dict[str, Any]:
    """Returns the runtime environment of the job: the folder of the code, and the variables of the workers."""
    chips = find_accelerator(record.spec.type).chip is not None
    return {
        "working_dir": ".",
        "excludes": [".git", "runs"],
        "env_vars": {"PYTHONUNBUFFERED": "1"} | ({} if chips else {"JAX_PLATFORMS": "cpu"}),
    }


def submission(record: LaunchRecord, address: str) -> list[str]:
    """Returns the command that submits the job.

    Args:
      record: the launch.
      address: the address of the cluster's dashboard.
    """
    spec, accelerator = record.spec, find_accelerator(record.spec.type)
    each = {"TPU": accelerator.chips_of_host} if accelerator.chip is not None else {"CPU": 1}
    driver = {
        "workers": len(spec.hosts),
        "resources": each,
        "seconds": max(1, round(record.hours * 3600)),
        "grace": record.grace,
        "retries": record.retries,
        "command": train_line(spec, shlex.quote(spec.python or "python")),
    }
    words = ["ray", "job", "submit", "--address", address, "--no-wait"]
    words += ["--submission-id", spec.id, "--runtime-env-json", json.dumps(runtime_env(record)), "--"]
    return [*words, "python", "-c", script("ray_driver.py").read_text(encoding="utf-8"), json.dumps(driver)]
