"""The window of metrics that an interrupt cuts short, as JSON in the checkpoint that is saved then.

A run that stops at step 7 of a window of 5 to 10 keeps the sums of 5 to 7; the run that goes on adds to them and logs
the line of step 10 that a run which never stopped would log. Tested in tests/run/test_resume.py.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxops.core.flight import OpenWindow


def window_to_json(window: OpenWindow) -> dict[str, Any]:
    """Converts a window to plain values, with arrays as base64, so that every bit comes back."""
    sums = {name: [_array_to_json(x) for x in arrays] for name, arrays in window.sums.items()}
    return {"first": window.first, "cursors": window.cursors, "updates": window.updates, "sums": sums}


def window_from_json(found: Any) -> OpenWindow | None:
    """Reads a window; None where there is none, or it cannot be read (a checkpoint of another version)."""
    try:
        sums = {name: tuple(map(_array_from_json, arrays)) for name, arrays in found["sums"].items()}
        cursors, updates = (tuple(map(int, found[name])) for name in ("cursors", "updates"))
        return OpenWindow(int(found["first"]), sums, cursors, updates)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _array_to_json(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array, np.float32).tobytes()).decode()
    return {"shape": list(array.shape), "float32": data}


def _array_from_json(found: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(found["float32"]), np.float32).reshape(found["shape"])
