"""A launch as a task of SkyPilot. jaxops writes it and runs nothing; SkyPilot finds machines and tries again.

Tested in tests/launch/test_rendered.py: SkyPilot's own parser accepts it.
"""

import shlex
from typing import Any

from jaxops.launch.accelerators import find_accelerator
from jaxops.launch.record import LaunchRecord
from jaxops.launch.render.jobset import RETRIED
from jaxops.launch.render.lines import train_line
from jaxops.launch.scripts import script

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""The image of a TPU VM, by chip: those of the Cloud TPU API, which has no later chips."""
_FAMILY = {"v5e": "v5litepod"}


def task(record: LaunchRecord) -> dict[str, Any]:
    """Returns the task, as an object that YAML writes down."""
    spec, accelerator = record.spec, find_accelerator(record.spec.type)
    resources: dict[str, Any] = {}
    if accelerator.chip is not None:
        family = accelerator.chip.name
        name = f"tpu-{_FAMILY.get(family, family)}-{accelerator.type.rpartition('-')[2]}"
        resources = {
            "infra": "gcp",
            "accelerators": {name: 1},
            "accelerator_args": {"runtime_version": RUNTIMES[family]},
        }
    if spec.price == "spot":
        resources["use_spot"] = True
    recovery = {"max_restarts_on_errors": record.retries, "recover_on_exit_codes": sorted(RETRIED)}
    resources["job_recovery"] = recovery
    made: dict[str, Any] = {"name": spec.name.lower(), "workdir": ".", "num_nodes": 1, "resources": resources}
    if accelerator.chip is None:
        made["num_nodes"] = len(spec.hosts)
    if spec.secrets:
        made["secrets"] = dict.fromkeys(spec.secrets)
    return made | {"setup": _setup(record), "run": _run(record)}


def _setup(record: LaunchRecord) -> str:
    spec = record.spec
    if spec.python:
        return f"{shlex.quote(spec.python)} -c 'import jaxops'\n"
    accel = "cpu" if find_accelerator(spec.type).chip is None else "tpu"
    text = script("setup_host.sh").read_text(encoding="utf-8")
    return (
        "cat >~/setup_host.sh <<'END_OF_SETUP_HOST'\n"
        f"{text}END_OF_SETUP_HOST\n"
        f"ACCEL={accel} sh ~/setup_host.sh {shlex.quote(spec.lock)} ~/jaxops-env\n"
    )


def _run(record: LaunchRecord) -> str:
    """Returns what each host runs. SkyPilot knows no limit in hours, so that `timeout` has it; it ends with 124."""
    seconds = max(1, round(record.hours * 3600))
    python = shlex.quote(record.spec.python) if record.spec.python else "~/jaxops-env/bin/python"
    return (
        'if [ "$SKYPILOT_NUM_NODES" -gt 1 ]; then\n'
        '    JAXOPS_COORDINATOR="$(printf "%s\\n" "$SKYPILOT_NODE_IPS" | head -n 1):8476"\n'
        "    JAXOPS_NUM_PROCESSES=$SKYPILOT_NUM_NODES JAXOPS_PROCESS_ID=$SKYPILOT_NODE_RANK\n"
        "    export JAXOPS_COORDINATOR JAXOPS_NUM_PROCESSES JAXOPS_PROCESS_ID\n"
        "fi\n"
        f"exec timeout --kill-after={max(1, round(record.grace))} {seconds} {train_line(record.spec, python)}\n"
    )
