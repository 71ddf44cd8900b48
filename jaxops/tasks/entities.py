"""Columns of users and items as table rows: encoded once for every user and item, looked up by row in each batch."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from jaxops.data.idmaps import Vocabulary, fit_map
from jaxops.data.interactions import Interactions
from jaxops.tables.spec import TableSpec
from jaxops.tasks.tables_config import TableConfig


@dataclasses.dataclass(frozen=True)
class Column:
    """Values by row of their entity; a bag has a list a row. `own`: the entity's ids themselves."""

    values: pa.Array
    own: bool = False


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What features of users and items came to.

    Attributes:
      codes: by feature, the table rows by user or item row, int32 [rows] or, of a bag, [rows, width] (-1: nothing).
      specs: by table.
      transform: the id maps as named arrays, for the run folder.
    """

    codes: dict[str, np.ndarray]
    specs: dict[str, TableSpec]
    transform: dict[str, np.ndarray]


def entity_columns(
    inter: Interactions, users: Mapping[str, pa.Array], items: Mapping[str, pa.Array]
) -> dict[str, Column]:
    """`user`, `item` and the columns of both, by row; item row 0 is padding, and null in every column."""
    padded = lambda values: pa.concat_arrays([pa.nulls(1, values.type), values])
    out = {"user": Column(inter.user_ids.table, own=True), "item": Column(padded(inter.item_ids.table), own=True)}
    out |= {name: Column(values) for name, values in users.items()}
    return out | {name: Column(padded(values)) for name, values in items.items()}


def encode(tables: Mapping[str, TableConfig], owner: Mapping[str, str], columns: Mapping[str, Column]) -> Encoded:
    """Codes and specs of the features of `owner` (feature to table); features of one table share its id map.

    Vocabularies are of all users and items that the data keeps, as item rows themselves are.
    """
    codes: dict[str, np.ndarray] = {}
    specs: dict[str, TableSpec] = {}
    transform: dict[str, np.ndarray] = {}
    for name, table in tables.items():
        features = tuple(feature for feature in owner if owner[feature] == name)
        mine = {feature: columns[feature] for feature in features}
        rows = None if table.rows == "auto" else table.rows
        whole = [column for column in mine.values() if column.own]
        if rows is None and isinstance(table.ids, Vocabulary) and len(whole) == len(mine):
            count = max(len(column.values) for column in whole)
            first = int(all(column.values.null_count == 0 for column in whole))  # users: row 0 is left for unknown ones
            for feature, column in mine.items():
                codes[feature] = np.arange(first, first + len(column.values), dtype=np.int32)
            specs[name] = table.spec(count + first, features)
            continue
        seen = {id(column.values): _flat(column.values) for column in mine.values()}
        fitted = fit_map(table.ids, name, _joined(list(seen.values())), rows)
        for feature, column in mine.items():
            codes[feature] = _coded(column.values, fitted.encode(_flat(column.values)))
        specs[name] = table.spec(fitted.rows, features)
        transform |= {f"map.{name}.{part}": values for part, values in fitted.arrays().items()}
    return Encoded(codes, specs, transform)


def _flat(values: pa.Array) -> pa.Array:
    return values.flatten() if pa.types.is_list(values.type) else values


def _joined(parts: list[pa.Array]) -> pa.Array:
    if len({part.type for part in parts}) > 1:
        parts = [part.cast(pa.string()) for part in parts]
    return pa.concat_arrays(parts)


def _coded(values: pa.Array, flat: np.ndarray) -> np.ndarray:
    """The codes of the flattened values, by row; bags padded with -1 to the longest."""
    if not pa.types.is_list(values.type):
        return flat
    lengths = np.asarray(values.value_lengths().fill_null(0))
    out = np.full((len(values), max(int(lengths.max(initial=0)), 1)), -1, np.int32)
    row = np.repeat(np.arange(len(values)), lengths)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    out[row, place] = flat
    return out
