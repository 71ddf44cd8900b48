"""Slices of a ranking evaluation, by the target item, its event's context, or the user of each query."""

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from jaxops.data.interactions.events import ColumnBatches, with_columns
from jaxops.data.interactions.heldout import Queries
from jaxops.data.interactions.interactions import Interactions
from jaxops.data.interactions.open import RecData
from jaxops.data.slices import SLICE, by_value, chosen, warm_and_cold
from jaxops.run.task import EvalBatches

Columns = Mapping[str, tuple[str, np.ndarray]]


def slice_columns(names: tuple[str, ...], data: RecData) -> dict[str, tuple[str, np.ndarray]]:
    """Returns columns for batches: by entry `slice/NAME`, the batch entry with the rows to look up, and a mask by row.

    A target item or a user is cold if it has no event in training.

    Raises:
      UserError: there is no such slice, or a column has too many values.
    """
    inter, split = data.inter, data.split
    position = np.arange(inter.n_events) - inter.offsets[:-1].repeat(inter.lengths)
    trained = inter.item[position < split.train_end.repeat(inter.lengths)]
    cold_item = np.bincount(trained, minlength=inter.n_items + 1) == 0
    owner = dict.fromkeys(("cold_user", "warm_user", *data.user_features), "user")
    owner |= dict.fromkeys(inter.contexts, "event")

    def of(name: str) -> dict[str, np.ndarray]:
        if name in data.user_features:
            return by_value(name, data.user_features[name])
        if name in inter.contexts:
            return by_value(name, inter.context_of(name))
        values = data.item_features[name]
        return by_value(name, pa.concat_arrays([pa.nulls(1, values.type), values]))

    ready = warm_and_cold("item", cold_item) | warm_and_cold("user", split.train_end == 0)
    columns = {**data.user_features, **data.item_features}
    plain = [name for name, values in columns.items() if not pa.types.is_list(values.type)] + [*inter.contexts]
    return {
        f"{SLICE}{mask}": (owner.get(name, "target"), rows)
        for name in names
        for mask, rows in chosen([name], ready, plain, of).items()
    }


def with_slice_columns(batches: Callable[[int], EvalBatches], columns: Columns) -> Callable[[int], EvalBatches]:
    """Returns evaluation batches that also have these slices."""
    return (lambda size: ColumnBatches(batches(size), columns)) if columns else batches


def slice_masks(columns: Columns, inter: Interactions, queries: Queries) -> dict[str, np.ndarray]:
    """Returns by slice the mask of its queries, equal to those in the batches of `with_slice_columns`."""
    asked = {"user": queries.user, "target": queries.target, "event": inter.offsets[queries.user] + queries.history}
    found = with_columns(asked, columns)
    return {name.removeprefix(SLICE): found[name] for name in columns}
