"""A metric by name: which way is better, and what people call it. The one home of "higher or lower is better"."""

import dataclasses
import math
from typing import Literal

Better = Literal["higher", "lower", "neither"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric of an evaluation.

    Early stopping, the best checkpoint, `compare` and the report all read `better`. A metric that is best at a value in
    between (a calibration ratio is, at one) is better in `neither` direction and chooses nothing.
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
        """True where `value` is better than the `best` so far (None: there is none); a NaN never is."""
        if not self.chooses or math.isnan(value):
            return False
        if best is None or math.isnan(best):
            return True
        return value > best if self.better == "higher" else value < best

    def best(self, values: "list[float]") -> float | None:
        """The best of the values; None where there is none, or none is better than another."""
        found = [value for value in values if not math.isnan(value)]
        if not found or not self.chooses:
            return None
        return max(found) if self.better == "higher" else min(found)


def label_of(name: str) -> str:
    """A name for people, by its spelling alone: `ndcg@10` gives `NDCG@10`, `log_loss` gives `Log loss`."""
    word, at, k = name.partition("@")
    if not word.isidentifier():  # an import path, say
        return name
    text = word.upper() if len(word) <= 4 and "_" not in word else word.replace("_", " ").capitalize()
    return text + at + k
