"""Comparisons of a round's policy with the one that it began as: pairs that do not tell which is which, and outcomes.

Tested in tests/flow/test_compare.py.
"""

import collections
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxops.flow.rlhf.pairs import AnswerPair, Vote


def compared(name: str, prompts: Sequence[Any], new: Sequence[str], old: Sequence[str], seed: int) -> list[AnswerPair]:
    """Returns pairs of the answers of two policies, each policy in the first place about half of the time.

    Args:
      name: what the ids of the pairs begin with.
      prompts: the prompts.
      new: the answers of the policy whose wins are counted.
      old: the answers of the other one.
      seed: the seed of the places.
    """
    found = []
    for at, (prompt, mine, theirs) in enumerate(zip(prompts, new, old, strict=True)):
        pair = f"{name}-c{at:06}"
        a, b = (mine, theirs) if is_first(pair, seed) else (theirs, mine)
        found.append(AnswerPair(pair, prompt, a, b))
    return found


def is_first(pair: str, seed: int) -> bool:
    """Returns whether the new policy's answer is `a`; nothing in the pair itself says so, since people read it."""
    return random.Random(f"{seed} place of {pair}").random() < 0.5


def outcomes(pairs: Sequence[AnswerPair], votes: Sequence[Vote], seed: int) -> list[float]:
    """Returns the share of each judged pair that the new policy wins: the mean of its votes; equal answers are a tie.

    Votes on one pair are no independent comparisons, so a pair counts once however many people have judged it.

    Args:
      pairs: the pairs, as `compared` made them.
      votes: votes on them; pairs without one are left out, unless their answers are equal.
      seed: the seed of the places.
    """
    said = collections.defaultdict[str, list[float]](list)
    for vote in votes:
        said[vote.id].append(vote.first if is_first(vote.id, seed) else 1 - vote.first)
    each = [[0.5] if pair.a == pair.b else said.get(pair.id, []) for pair in pairs]
    return [float(np.mean(one)) for one in each if one]
