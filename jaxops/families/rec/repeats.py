"""Items that come again to the same user: one setting says whether they are learnt, ranked and recommended."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from jaxops.core.failures import UserError
from jaxops.data.interactions.arrange import user_ranges
from jaxops.data.interactions.heldout import Split
from jaxops.data.interactions.interactions import Interactions
from jaxops.data.interactions.open import RecData
from jaxops.evaluate.ranking import Repeats

CHUNK = 1 << 22
"""Events that are looked at once."""
WORTH_TELLING = 0.01
"""The share of targets that their users know already, from where on a run says so."""


def seen_before(inter: Interactions) -> Bool[np.ndarray, " events"]:
    """Returns a mask over the events: true where the user had the same item in an earlier event."""
    found = np.zeros(inter.n_events, bool)
    for start, stop in user_ranges(inter.offsets, CHUNK):
        at = slice(int(inter.offsets[start]), int(inter.offsets[stop]))
        user, item = inter.user[at], inter.item[at]
        order = np.lexsort((item, user))  # stable: equal pairs stay in order of time
        again = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0)
        found[at.start + order[1:][again]] = True
    return found


def target_weights(
    inter: Interactions, split: Split, repeats: Repeats, *, first: bool
) -> Float32[np.ndarray, " events"] | None:
    """Returns how much each event counts as a target: its weight, or 0 for a repeat that is excluded.

    The result is None where every event counts one.

    Args:
      inter: the events.
      split: its training part is what is looked at.
      repeats: the setting of the run.
      first: whether a user's first event is a target too.

    Raises:
      UserError: a weight is negative, or no training target counts.
    """
    weight = np.asarray(inter.weight)
    if len(weight) and weight.min() < 0:
        raise UserError(f"data.columns.weight: a weight is {weight.min():g}; expected 0 or more")
    again = seen_before(inter) if repeats == "exclude" else np.zeros(0, bool)
    if not again.any() and (weight == 1).all():
        return None
    found = np.where(again, np.float32(0), weight) if again.any() else weight
    position = np.arange(inter.n_events) - inter.offsets[:-1].repeat(inter.lengths)
    targets = (position < split.train_end.repeat(inter.lengths)) & (position >= (0 if first else 1))
    if targets.any() and not (found[targets] > 0).any():
        if (weight[targets] > 0).any():
            raise UserError(
                "repeats: exclude: every training target is an item that its user has had before, so there is nothing"
                " to learn; set repeats=allow"
            )
        raise UserError("data.columns.weight: no training target has a weight above 0, so there is nothing to learn")
    return found


def count_repeats(data: RecData) -> dict[str, int]:
    """Counts the training events, and the targets of validation and test, whose user has had the item before."""
    inter, split = data.inter, data.split
    again = seen_before(inter)
    position = np.arange(inter.n_events) - inter.offsets[:-1].repeat(inter.lengths)
    of = lambda part: int(again[inter.offsets[part.user] + part.history].sum()) if len(part) else 0
    return {
        "train": int(again[position < split.train_end.repeat(inter.lengths)].sum()),
        "valid": of(split.valid),
        "test": of(split.test),
    }


def describe_repeats(counts: dict[str, int], split: dict[str, Any]) -> str:
    """Describes the counts of `count_repeats` in words, each beside the size of its part."""
    of = {"train": ("train_events", "training events"), "valid": ("valid", "validation targets")}
    of["test"] = ("test", "test targets")
    return ", ".join(f"{counts[part]:,} of {split[total]:,} {what}" for part, (total, what) in of.items())


def repeats_notices(counts: dict[str, int], split: dict[str, Any], repeats: Repeats) -> list[str]:
    """Returns a line for people if enough targets are repeats to matter, else none."""
    share = max((counts[part] / split[part] for part in ("valid", "test") if split[part]), default=0.0)
    if repeats != "exclude" or share < WORTH_TELLING:
        return []
    return [
        f"repeats: exclude: {describe_repeats(counts, split)} are items that their users have had before: they are"
        " neither learnt, nor measured, nor recommended (repeats=allow does all three)"
    ]
