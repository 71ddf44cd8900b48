"""The commands of Google's own tools that ask for the same shape of machines as a JobSet: `gcluster` and `xpk`.

Both make a JobSet of their own from their arguments, with an image that holds the code, so they are for those who work
with these tools already. jaxops runs neither. Tested in tests/launch/test_other_tools.py.
"""

import shlex
from collections.abc import Sequence

from jaxops.launch.render.jobset import RETRIED, JobSetPlan

_XPK_FAMILY = {"v5e": "v5litepod"}


def gcluster_line(plan: JobSetPlan, argv: Sequence[str]) -> str:
    """Returns the command of the Cluster Toolkit that submits such a job.

    Args:
      plan: the JobSet of the launch, on chips.
      argv: the training, as the image would run it.
    """
    accelerator = plan.accelerator
    assert accelerator.chip is not None
    words = ["gcluster", "job", "submit", "--name", plan.name, "--image", plan.image, "--command", shlex.join(argv)]
    words += ["--compute-type", accelerator.chip.gke, "--topology", accelerator.topology]
    words += ["--num-slices", str(accelerator.slices), "--restarts", str(plan.retries)]
    words += ["--grace-period", f"{max(1, round(plan.grace))}s"]
    words += ["--restart-on-exit-codes", ",".join(map(str, RETRIED))]
    words += ["--queue", plan.queue] if plan.queue else []
    words += ["--service-account", plan.service_account] if plan.service_account else []
    if plan.price in ("spot", "reservation"):
        words += ["--gke-nap-provisioning", plan.price]
    if plan.price == "reservation":
        words += ["--gke-nap-reservation", plan.reservation]
    return _line(words, {"cluster": "CLUSTER", "location": "LOCATION", "project": "PROJECT"})


def xpk_line(plan: JobSetPlan, argv: Sequence[str]) -> str:
    """Returns the command of xpk that submits such a job.

    Args:
      plan: the JobSet of the launch, on chips.
      argv: the training, as the image would run it.
    """
    accelerator = plan.accelerator
    assert accelerator.chip is not None
    family = accelerator.chip.name
    kind = f"{_XPK_FAMILY.get(family, family)}-{accelerator.type.rpartition('-')[2]}"
    words = ["xpk", "workload", "create", "--workload", plan.name, "--docker-image", plan.image]
    words += ["--command", shlex.join(argv), "--tpu-type", kind, "--num-slices", str(accelerator.slices)]
    words += ["--max-restarts", str(plan.retries)]
    words += ["--restart-on-exit-codes", ",".join(str(code) for code in RETRIED if code < 127)]
    words += ["--termination-grace-period-seconds", str(max(1, round(plan.grace)))]
    words += {
        "on demand": [],
        "spot": ["--spot"],
        "flex": ["--flex"],
        "reservation": ["--reservation", plan.reservation],
    }[plan.price]
    return _line(words, {"cluster": "CLUSTER", "zone": "ZONE", "project": "PROJECT"})


def _line(words: Sequence[str], place: dict[str, str]) -> str:
    """Returns a command line, at whose end stand the words that the reader fills in."""
    return f"{shlex.join(words)} {' '.join(f'--{name} {value}' for name, value in place.items())}"
