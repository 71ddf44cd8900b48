"""How far people agree with each other on the same two texts, and the accuracy that no model can pass for it."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxops.data.preferences.formats import Pair
from jaxops.data.preferences.ratings import Draws, Ratings


@dataclasses.dataclass(frozen=True)
class AnnotatorAgreement:
    """Agreement of people; each figure is None where the data does not tell it.

    Attributes:
      agreement: the share of two people's judgements of the same two texts that are alike, where neither is a tie.
      judged_twice: the number of pairs of judgements that this is of.
      ties: the share of judgements that are ties.
      others: the accuracy of the mean of all other people's ratings, on single judgements without ties.
    """

    agreement: float | None = None
    judged_twice: int = 0
    ties: float | None = None
    others: float | None = None

    @property
    def ceiling(self) -> float | None:
        """The accuracy that a perfect model would have on single judgements, as far as the data tells.

        That of the mean of the other ratings where there are some. Else what the agreement implies, if each judgement
        departs from the truth with one and the same probability 1 - q, independently: two of them are alike with
        probability q^2 + (1 - q)^2.
        """
        if self.others is not None:
            return self.others
        if self.agreement is None or self.agreement < 0.5:
            return None
        return (1 + math.sqrt(2 * self.agreement - 1)) / 2


def of_preferences(pairs: Sequence[Pair]) -> AnnotatorAgreement:
    """Returns the agreement of all judgements of the same two answers to the same prompt."""
    ties = float(np.mean([pair.label == 0.5 for pair in pairs]))
    votes: dict[bytes, list[int]] = {}
    for pair in pairs:
        if pair.label != 0.5:
            first = pair.texts[0].digest() < pair.texts[1].digest()
            better_is_chosen = pair.label > 0.5
            votes.setdefault(pair.prompt + pair.question, []).append(first == better_is_chosen)
    alike = both = 0
    for cast in votes.values():
        one, other = sum(cast), len(cast) - sum(cast)
        alike += math.comb(one, 2) + math.comb(other, 2)
        both += math.comb(len(cast), 2)
    return AnnotatorAgreement(alike / both if both else None, both, ties)


def of_ratings(ratings: Ratings, seed: int, epochs: int) -> AnnotatorAgreement:
    """Returns the agreement on the judgements that are drawn with this seed in the first epochs."""
    labels, again, others = [], [], []
    for epoch in range(epochs):
        drawn: Draws = ratings.drawn(seed, epoch)
        labels.append(ratings.single(drawn))
        again.append(ratings.single(ratings.again(drawn, epoch)))
        others.append(ratings.others(drawn))
    label, second, mean = np.concatenate(labels), np.concatenate(again), np.concatenate(others)
    decided = label != 0.5
    both = decided & (second != 0.5)
    known = decided & np.isfinite(mean).all(axis=1)
    right = 0.5 + 0.5 * np.sign(mean[known, 0] - mean[known, 1]) * np.sign(label[known] - 0.5)
    several = bool((np.diff(ratings.offsets) > 1).all())
    return AnnotatorAgreement(
        float((label == second)[both].mean()) if several and both.any() else None,
        int(both.sum()) if several else 0,
        float((~decided).mean()),
        float(right.mean()) if known.any() else None,
    )
