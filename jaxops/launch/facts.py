"""What a launch tells the run that it starts about itself: jaxops/run/attempts.py keeps it in the run's folder."""

from typing import Any

from jaxops.launch.accelerators import find_accelerator
from jaxops.launch.record import LaunchRecord

VARIABLE = "JAXOPS_ATTEMPT"
_LABELS = ("queue", "namespace", "partition", "account")


def launch_facts(record: LaunchRecord) -> dict[str, Any]:
    """Returns the facts that all attempts of a launch share; none is a secret.

    Virtual devices of a CPU are no chips, so that a launch on them has no chip-hours.
    """
    spec, accelerator = record.spec, find_accelerator(record.spec.type)
    image, _, digest = spec.options.get("image", "").partition("@")
    facts = {
        "chips": accelerator.chips if accelerator.chip is not None else None,
        "accelerator": spec.type,
        "backend": spec.backend,
        "price": spec.price,
        "code": record.code,
        "image": image,
        "image_digest": digest,
        "launch": spec.id,
        "hosts": len(spec.hosts),
        "labels": {key: spec.options[key] for key in _LABELS if spec.options.get(key)},
    }
    return {name: value for name, value in facts.items() if value not in ("", None, {})}
