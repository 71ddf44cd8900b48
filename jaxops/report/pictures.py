"""Pictures of a run's arrays for trackers: a PNG for each. Tested in tests/core/test_writers.py."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure


def pictures(summary: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the PNG of each array of a summary that can be drawn: predicted against observed rates."""
    for name, value in summary.items():
        if name.endswith("/reliability") and (values := reliability_bins(value)) is not None:
            yield name, _reliability_png(values, name)


def reliability_bins(value: Any) -> Float[np.ndarray, "3 bins"] | None:
    """Returns the predicted rate, the observed rate and the share of examples by bin, or None for anything else.

    Args:
      value: an entry of a summary; the null of an empty bin becomes NaN.
    """
    try:
        values = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    if values.ndim != 2 or len(values) != 3:
        return None
    known = values[:, filled_bins(values)]
    # A rate lies between 0 and 1; one in float32 may be off by a little.
    return values if known.size and ((known >= 0) & (known <= 1.001)).all() else None


def filled_bins(values: Float[np.ndarray, "3 bins"]) -> np.ndarray:
    """Returns, for each bin, whether it has examples."""
    return np.isfinite(values).all(axis=0) & (values[2] > 0)


def _reliability_png(values: Float[np.ndarray, "3 bins"], title: str) -> bytes:
    predicted, observed, _ = values[:, filled_bins(values)]
    top = 1.05 * max(float(predicted.max()), float(observed.max()), 1e-6)
    figure = Figure(figsize=(4.8, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, top], [0, top], linestyle="--", color="grey", label="as predicted")
    axes.plot(predicted, observed, marker="o", label="observed")
    axes.set(xlabel="predicted rate", ylabel="observed rate", title=title)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
