"""The record of what training saw, by user and by item, which a run keeps beside its transform.

It says which items have a vector that was learnt, and which events of other data the model knows already.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float64, Int64

from jaxops.core.failures import UserError
from jaxops.data.ids import Ids
from jaxops.data.interactions.arrange import user_ranges
from jaxops.data.interactions.heldout import Queries, Split
from jaxops.data.interactions.interactions import Interactions
from jaxops.run.saved_run import SavedRun

CHUNK = 1 << 22
"""Events that are looked at at once."""
ITEMS, USERS, EVENTS, UNTIL = "trained.items", "trained.users", "trained.events", "trained.until"


@dataclasses.dataclass(frozen=True)
class Trained:
    """The record of what training saw: its items, its users, and how much of each user's history.

    Attributes:
      items: whether an item has a training event, by item row; row 0 is no item.
      users: ids of the users.
      events: how many of a user's events, from the first on, were trained on.
      until: the time of the last of them; -inf where there was none, NaN where the data has no times.
    """

    items: Bool[np.ndarray, " rows"]
    users: Ids
    events: Int64[np.ndarray, " users"]
    until: Float64[np.ndarray, " users"]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the record as named arrays for the run folder."""
        users = np.asarray(self.users.values)
        return {ITEMS: self.items, USERS: users, EVENTS: self.events, UNTIL: self.until}

    def knows(self, inter: Interactions, queries: Queries) -> Bool[np.ndarray, " queries"]:
        """Returns a mask over queries of other data: true where the target is an event that was trained on.

        Times decide where both data have them; else the place among the user's events.
        """
        if not len(queries):
            return np.zeros(0, bool)
        rows = self.users.rows(inter.user_ids.originals(queries.user))
        at = np.maximum(rows, 0)
        timed = inter.timed & ~np.isnan(self.until[at])
        time = inter.time[inter.offsets[queries.user] + queries.history]
        earlier = np.where(timed, time <= self.until[at], queries.history < self.events[at])
        return (rows >= 0) & earlier


def trained_on(inter: Interactions, split: Split) -> Trained:
    """Makes the record of this split's training part."""
    has = split.train_end > 0
    last = inter.offsets[:-1] + np.maximum(split.train_end, 1) - 1
    time = np.asarray(inter.time[last], np.float64) if inter.timed else np.full(inter.n_users, np.nan)
    until = np.where(has, time, -np.inf) if inter.timed else time
    return Trained(trained_items(inter, split), Ids(inter.user_ids.values, 0), split.train_end.astype(np.int64), until)


def trained_items(inter: Interactions, split: Split) -> Bool[np.ndarray, " rows"]:
    """Returns a mask by item row: true for an item with a training event whose weight is above zero."""
    found = np.zeros(inter.n_items + 1, bool)
    for start, stop in user_ranges(inter.offsets, CHUNK):
        at = slice(int(inter.offsets[start]), int(inter.offsets[stop]))
        user = inter.user[at]
        position = np.arange(at.start, at.stop) - inter.offsets[user]
        found[inter.item[at][(position < split.train_end[user]) & (inter.weight[at] > 0)]] = True
    return found


def recorded(saved: SavedRun) -> Trained | None:
    """Reads the record of a run; None for a run of an older version, which wrote none."""
    try:
        users = Ids.of(saved.transform(USERS), first=0)
        return Trained(saved.transform(ITEMS).astype(bool), users, saved.transform(EVENTS), saved.transform(UNTIL))
    except UserError:
        return None


def digest(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns `{"sha256": ...}` over the named arrays of features, so that a later change of them is noticed."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        found.update(values.data)
    return {"sha256": found.hexdigest()}
