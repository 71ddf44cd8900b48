"""Metrics by name, with their better direction and their label; the one home of "higher or lower is better"."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from jaxops.core.failures import UserError, nearest

Better = Literal["higher", "lower", "neither"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric of an evaluation.

    Early stopping, the best checkpoint, `compare` and the report all read `better`.

    Attributes:
      name: the name in results: `ndcg@10`.
      better: the direction that is better. `neither` is for a metric that is best at a value in between, as a
        calibration ratio is at one; such a metric chooses nothing.
      label: the name for people; empty derives it from `name`.

    Example:
      loss = jaxops.Metric("log_loss", better="lower")
      assert loss.improves(0.4, best=0.5) and loss.shown == "Log loss"
    """

    name: str
    better: Better = "higher"
    label: str = ""

    @property
    def shown(self) -> str:
        """The name for people: `NDCG@10`."""
        return self.label or label_of(self.name)

    @property
    def chooses(self) -> bool:
        """True where one value can be better than another."""
        return self.better != "neither"

    def improves(self, value: float, best: float | None) -> bool:
        """Returns whether `value` is better than the `best` so far (None: there is none); NaN never is."""
        if not self.chooses or math.isnan(value):
            return False
        if best is None or math.isnan(best):
            return True
        return value > best if self.better == "higher" else value < best

    def best(self, values: "list[float]") -> float | None:
        """Returns the best of the values; None where all are NaN or the metric chooses nothing."""
        found = [value for value in values if not math.isnan(value)]
        if not found or not self.chooses:
            return None
        return max(found) if self.better == "higher" else min(found)


def metric_of(metrics: Mapping[str, Metric], name: str) -> Metric:
    """Returns the metric of this name out of those that a family has.

    Raises:
      UserError: there is none; the message names the nearest right one.
    """
    if name not in metrics:
        raise UserError(f"no metric {name!r}{nearest(name, metrics)} (known: {', '.join(metrics)})")
    return metrics[name]


def label_of(name: str) -> str:
    """Returns a name for people from the spelling alone: `NDCG@10` for `ndcg@10`, `Log loss` for `log_loss`."""
    word, at, k = name.partition("@")
    if not word.isidentifier():  # an import path, say
        return name
    text = word.upper() if len(word) <= 4 and "_" not in word else word.replace("_", " ").capitalize()
    return text + at + k
