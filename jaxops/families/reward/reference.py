"""The reference texts of a run, on which its scores are served with a mean of 0 and a deviation of 1.

A run folder keeps their tokens, and what serves the model scores them with the very weights that it serves. So every
checkpoint of a run is normalised exactly, the best one and any other, and nothing of it is in the state.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int64

from jaxops.data.preferences.pairs import Texts
from jaxops.run.saved_run import SavedRun

TOKENS, OFFSETS = "reference.tokens", "reference.offsets"


def stored_reference(texts: Texts, count: int) -> Mapping[str, np.ndarray]:
    """Returns the arrays that a run folder keeps: up to `count` of the texts, drawn alike in all runs.

    They are drawn and not taken in steps: in every other text of preferences the better one stands.
    """
    drawn = np.random.Generator(np.random.Philox(0)).permutation(len(texts))[:count]
    chosen = np.sort(drawn)
    parts = [texts.of(int(text)) for text in chosen]
    return {TOKENS: np.concatenate(parts), OFFSETS: np.cumsum([0, *map(len, parts)], dtype=np.int64)}


def reference_of(saved: SavedRun) -> tuple[np.ndarray, Int64[np.ndarray, " texts_and_one"]]:
    """Returns the tokens of a run's reference texts, and where each begins.

    Raises:
      UserError: the run folder lacks them.
    """
    return saved.transform(TOKENS).astype(np.int32), saved.transform(OFFSETS).astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Normaliser:
    """The shift and scale that give scores a mean of 0 and a deviation of 1 on the reference texts.

    Each head's own mean is taken off, since preferences determine no head's level. All are divided by the deviation of
    their mean, so that the mean of the heads has deviation 1 and their spread keeps its meaning.

    Attributes:
      means: the mean of each head's scores.
      deviation: the deviation of the mean of all heads; 1 where all reference texts have one score.
    """

    means: Float[np.ndarray, " heads"]
    deviation: float

    @staticmethod
    def of(scores: Float[np.ndarray, "texts heads"]) -> "Normaliser":
        """Returns the shift and scale for these scores of the reference texts."""
        scores = np.asarray(scores, np.float64)
        deviation = float(scores.mean(axis=1).std())
        return Normaliser(scores.mean(axis=0), deviation if deviation > 0 else 1.0)

    def __call__(self, scores: Float[np.ndarray, "texts heads"]) -> Float[np.ndarray, "texts heads"]:
        """Returns normalised scores, float64."""
        return (np.asarray(scores, np.float64) - self.means) / self.deviation
