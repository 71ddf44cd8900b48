"""Rewards of answers that can be checked: `rewards: [{fn: "jaxops.rl.rewards.verifiable:exact"}]`.

Tested in tests/rl/test_verifiable.py.
"""

from collections.abc import Sequence
from typing import Any


def exact(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any]) -> list[float | None]:
    """Returns 1 for each completion that is the column `answer` of its row, blanks around it aside, and else 0.

    A row without an answer cannot be judged, and its completions are dropped.
    """
    return [
        None if right is None else float(said.strip() == str(right).strip())
        for said, right in zip(completions, answer, strict=True)
    ]
