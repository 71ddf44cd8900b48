"""Metrics of predicted click probabilities: order (AUC), information (log loss, NE) and calibration.

All but the order are sums over examples, so any cut of the data into batches, devices and hosts merges to the same
numbers. An order needs all scores at once: grouped.py brings them to the host. Tested in
tests/evaluate/test_clicks.py, against numpy in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxops.core.failures import UserError, nearest
from jaxops.core.metric import Better, Metric
from jaxops.core.sums import Sum, Sums

RELIABILITY_BINS = 20
CLICK_METRICS: dict[str, Better] = {
    "auc": "higher",
    "gauc": "higher",
    "log_loss": "lower",
    "ne": "lower",
    "calibration": "neither",
    "ece": "lower",
}
"""The names to report and which way each is better. Calibration is best at one, so it is better neither way."""


def click_metric(name: str) -> Metric:
    """Returns the click metric of this name.

    Raises:
      UserError: the name is unknown; the message gives the nearest right one.
    """
    if name in CLICK_METRICS:
        return Metric(name, CLICK_METRICS[name])
    known = ", ".join(CLICK_METRICS)
    raise UserError(f"unknown metric {name!r}{nearest(name.lower(), CLICK_METRICS)}; clicks are judged by {known}")


def click_sums(
    logits: Float[Array, " batch"], label: Float[Array, " batch"], weight: Float[Array, " batch"] | None = None
) -> Sums:
    """Returns the sums of `log_loss`, `ne`, `calibration`, `ece` and `reliability`; for the AUC see grouped.py.

    `ne` is the log loss over the entropy of the click rate (He et al. 2014): a model that knows only the rate has 1.
    `calibration` is predicted clicks over clicks. `reliability` is [3, bins]: predicted rate, click rate and share of
    the examples, in equal steps of the predicted probability; rates are NaN where a bin is empty. `ece` is the mean
    distance between the two rates, weighted by the share.

    Args:
      logits: logits of the probability of a click.
      label: 1 for a click, else 0.
      weight: weight of each example, 0 for padding; default 1.
    """
    logits, label = logits.astype(jnp.float32), label.astype(jnp.float32)
    weight = jnp.ones_like(logits) if weight is None else weight.astype(jnp.float32)
    logits, label = jnp.where(weight > 0, logits, 0), jnp.where(weight > 0, label, 0)
    loss = jax.nn.softplus(logits) - label * logits
    p = jax.nn.sigmoid(logits)
    clicks, total = jnp.sum(weight * label), jnp.sum(weight)
    bins = _reliability(p, label, weight)
    return {
        "log_loss": Sum.of(loss, weight),
        "ne": Sum(jnp.stack([jnp.sum(weight * loss), clicks]), jnp.stack([total, total]), _normalised_entropy),
        "calibration": Sum(jnp.sum(weight * p), clicks),
        "ece": Sum(bins, jnp.full_like(bins, total), _expected_error),
        "reliability": Sum(bins, jnp.full_like(bins, total), _by_bin),
    }


def _reliability(p: Array, label: Array, weight: Array) -> Float[Array, "3 bins"]:
    at = jnp.clip((p * RELIABILITY_BINS).astype(jnp.int32), 0, RELIABILITY_BINS - 1)
    parts = (weight * p, weight * label, weight)
    return jnp.stack([jnp.zeros(RELIABILITY_BINS, jnp.float32).at[at].add(part) for part in parts])


def _by_bin(shares: np.ndarray) -> np.ndarray:
    predicted, clicked, share = shares
    rate = lambda x: np.divide(x, share, out=np.full_like(share, np.nan), where=share > 0)
    return np.stack([rate(predicted), rate(clicked), share])


def _expected_error(shares: np.ndarray) -> float:
    predicted, clicked, _ = shares
    return float(np.sum(np.abs(predicted - clicked)))


def _normalised_entropy(means: np.ndarray) -> float:
    """Returns the mean loss over the entropy of the mean label; NaN where all labels are alike."""
    loss, rate = means
    if not 0 < rate < 1:
        return float("nan")
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))
