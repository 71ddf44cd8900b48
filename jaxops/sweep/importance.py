"""How much of the differences between points each swept path explains alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from jaxops.report.compare import yaml_of
from jaxops.sweep.results import SeedGroup

FEWEST = 6
"""Points below which nothing is said: a share would be of chance."""


def importance(groups: Sequence[SeedGroup], paths: Sequence[str]) -> list[tuple[str, float]]:
    """Returns the paths with the share of the variance between points that each explains alone, largest first.

    For a path of few values it is the variance between them less what chance would give (omega squared, without its
    small correction of the total). For numbers that hardly repeat it is Spearman's rank correlation, squared.
    """
    groups = [group for group in groups if group.mean is not None]
    if len(groups) < FEWEST:
        return []
    means = np.array([group.mean for group in groups])
    if np.ptp(means) == 0:
        return []
    shares = [(path, _share([group.values.get(path) for group in groups], means)) for path in paths]
    return sorted(shares, key=lambda one: -one[1])


def _share(values: Sequence[Any], means: np.ndarray) -> float:
    texts = [yaml_of(value) for value in values]
    kinds, count = sorted({*texts}), len(means)
    if len(kinds) < 2:
        return 0.0
    if len(kinds) > count / 2:
        return float(stats.spearmanr(values, means).statistic ** 2) if all(map(is_number, values)) else 0.0
    which = np.array([kinds.index(text) for text in texts])
    total = float(((means - means.mean()) ** 2).sum())
    within = float(sum(((means[which == kind] - means[which == kind].mean()) ** 2).sum() for kind in range(len(kinds))))
    chance = (len(kinds) - 1) * within / max(count - len(kinds), 1)
    return max(0.0, (total - within - chance) / total)


def is_number(value: Any) -> bool:
    """Returns whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
