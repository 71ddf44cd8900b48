"""Features of users, items and events as table rows: each entity is encoded once, and batches look its codes up."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from jaxops.data.bags import WEIGHT, flat, joined, padded, padded_weights
from jaxops.data.clicks.spec import ClicksFile
from jaxops.data.idmaps import Vocabulary, fit_map, restore_map
from jaxops.data.interactions.open import RecData
from jaxops.data.interactions.spec import InteractionsFile
from jaxops.data.spec import SideFile, name_owners
from jaxops.families.rec.config import RecConfig
from jaxops.families.rec.tables_config import TableConfig, features_of
from jaxops.families.rec.trained import digest
from jaxops.tables.spec import TableSpec

RESERVED = frozenset(
    ("id", "event", "user", "item", "items", "seen", "target", "targets", "negatives", "target_item", "negative_item",
     "history", "weight", "log_q", "rows", "plan", "slots")
)  # fmt: skip
"""Names of the other entries of interaction batches, which no feature may have."""


@dataclasses.dataclass(frozen=True)
class EntityColumn:
    """One feature column of users, items or events.

    Attributes:
      values: one value for each row of the entity; a bag has lists.
      own: true for the column of the entity's own ids.
      weights: weights of a bag's values, with the same lengths.
      seen: the values in training, which alone enter the id map (default: all values).
    """

    values: pa.Array
    own: bool = False
    weights: pa.Array | None = None
    seen: pa.Array | None = None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Features of users, items and events, encoded as table rows.

    Attributes:
      codes: by feature, the table row of each entity row: int32 [rows], or [rows, width] for a bag (-1: nothing).
      specs: the tables by name.
      maps: the id maps of values that are not ids of users or items, as named arrays.
      weights: by weighted bag, float32 [rows, width].
    """

    codes: dict[str, np.ndarray]
    specs: dict[str, TableSpec]
    maps: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def columns(self, entries: Mapping[str, str]) -> dict[str, tuple[str, np.ndarray]]:
        """Returns columns for batches (interactions/events.py): the codes and weights of each feature of `entries`.

        `entries` names by feature the batch entry that holds the entity rows to look the codes up with.
        """
        out = {name: (entry, self.codes[name]) for name, entry in entries.items() if name in self.codes}
        weights = {f"{name}{WEIGHT}": (entries[name], found) for name, found in self.weights.items() if name in entries}
        return out | weights

    def digest(self) -> dict[str, str]:
        """A digest of what the features hold, which tells changed ones apart."""
        weights = {f"{name}{WEIGHT}": values for name, values in self.weights.items()}
        return digest({**self.codes, **weights})

    def add_nobody(self, features: Collection[str]) -> None:
        """Appends one row to the codes of these features, which index -1 reads: an unknown user, or no event.

        Its code is that of unknown values. For bags and for `user` itself it is nothing (-1), since no training example
        has an unknown user.
        """
        for name in features:
            self.codes[name] = _with_nobody(self.codes[name], name == "user")
            if name in self.weights:
                self.weights[name] = np.pad(self.weights[name], ((0, 1), (0, 0)))

    def frozen(self, features: Collection[str]) -> dict[str, np.ndarray]:
        """Returns the named arrays by which serving restores these features, for the run folder."""
        rows = {f"table.{name}.rows": np.array([spec.rows]) for name, spec in self.specs.items()}
        weights = {f"weights.{feature}": self.weights[feature] for feature in features if feature in self.weights}
        return self.maps | rows | weights | {f"codes.{feature}": self.codes[feature] for feature in features}


def _with_nobody(codes: np.ndarray, nothing: bool = False) -> np.ndarray:
    """Appends the code of unknown values, or that of nothing (for bags, and where asked)."""
    nobody = np.full((1, *codes.shape[1:]), -1 if nothing or codes.ndim > 1 else 0, codes.dtype)
    return np.concatenate([codes, nobody])


def restore_features(
    tables: Mapping[str, TableConfig],
    owner: Mapping[str, str],
    weighted: Collection[str],
    read: Callable[[str], np.ndarray],
    asked: Collection[str] = (),
) -> Encoded:
    """Restores encoded features from the arrays of `Encoded.frozen`.

    Args:
      tables: the config's tables.
      owner: the table of each feature.
      weighted: the features that have weights.
      read: returns an array of the transform by name.
      asked: features whose values come with each query. They have no codes here; `query_codes` makes them.
    """
    specs = {}
    for name, table in tables.items():  # in the order of training, which is that of the rows in a stack
        features = tuple(feature for feature in owner if owner[feature] == name)
        specs[name] = table.spec(int(read(f"table.{name}.rows")[0]), features)
    codes = {feature: read(f"codes.{feature}") for feature in owner if feature not in asked}
    return Encoded(codes, specs, weights={name: read(f"weights.{name}") for name in owner if name in weighted})


def restored_features(
    config: RecConfig, names: Collection[str], asked: Collection[str], read: Callable[[str], np.ndarray]
) -> Encoded:
    """Restores the frozen features of a trained model.

    Args:
      config: the config of the run.
      names: the features that the model reads.
      asked: those of them whose values come with each query.
      read: returns an array of the run's transform by name.
    """
    owner = features_of(config.tables)
    weighted = {name for file in side_files(config.data) for name in file.weights}
    return restore_features(config.tables, {name: owner[name] for name in names}, weighted, read, asked)


def side_files(data: Any) -> list[SideFile]:
    """Returns the side files of users and items that a data section names."""
    if not isinstance(data, InteractionsFile | ClicksFile):
        return []
    return [file for file in (data.user_features, data.item_features) if file is not None]


def context_columns(data: Any) -> tuple[str, ...]:
    """Returns the context columns of events that a data section names."""
    return data.columns.context if isinstance(data, InteractionsFile) else ()


def query_codes(
    tables: Mapping[str, TableConfig], values: Mapping[str, pa.Array], read: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Encodes the values that come with queries through the frozen id maps; a last row (index -1) is for no event.

    Args:
      tables: the config's tables.
      values: by feature, one value for each query or event.
      read: returns an array of the run's transform by name.

    Returns:
      By feature, the table rows.
    """
    owner, codes = features_of(tables), {}
    for feature, found in values.items():
        table = owner[feature]
        fitted = restore_map(tables[table].ids, functools.partial(_named, read, table))
        codes[feature] = _with_nobody(fitted.encode(found, feature))
    return codes


def _named(read: Callable[[str], np.ndarray], table: str, part: str) -> np.ndarray:
    return read(f"map.{table}.{part}")


def feature_names(data: RecData) -> list[str]:
    """Returns the features that a model can read: users and items themselves, and all columns of the data."""
    sides = [name for name in (*data.user_features, *data.item_features) if not name.endswith(WEIGHT)]
    return list(dict.fromkeys(["user", "item", *sides, *data.inter.contexts]))


def feature_columns(data: RecData, names: Collection[str], reserved: Collection[str] = ()) -> dict[str, EntityColumn]:
    """Returns the columns of these features, as far as the data has them, by row of their entity.

    Item row 0 is padding, and null in every column. Vocabularies of event columns are made from training events only.
    `reserved` adds names of batch entries that no feature may have.

    Raises:
      UserError: a feature has the name of a batch entry, or is a column of two of users, items and events.
    """
    inter = data.inter
    asked = lambda columns: {name: values for name, values in columns.items() if name.removesuffix(WEIGHT) in names}
    users, items = asked(data.user_features), asked(data.item_features)
    contexts = [name for name in inter.contexts if name in names]
    named = [("data.user_features", users), ("data.item_features", items), ("data.columns.context", contexts)]
    name_owners(named, {*RESERVED, *reserved})  # an entry of a batch would replace another of its name
    shifted = lambda values: pa.concat_arrays([pa.nulls(1, values.type), values])
    out = {
        "user": EntityColumn(inter.user_ids.table, own=True),
        "item": EntityColumn(shifted(inter.item_ids.table), own=True),
    }
    for columns, placed in ((users, lambda values: values), (items, shifted)):
        for name in (name for name in columns if not name.endswith(WEIGHT)):
            weights = columns.get(f"{name}{WEIGHT}")
            out[name] = EntityColumn(placed(columns[name]), weights=None if weights is None else placed(weights))
    if contexts:
        position = np.arange(inter.n_events) - inter.offsets[:-1].repeat(inter.lengths)
        training = np.flatnonzero(position < data.split.train_end.repeat(inter.lengths))
        for name in contexts:
            out[name] = EntityColumn(inter.context_of(name), seen=inter.context_of(name, training))
    return out


def encode_features(
    tables: Mapping[str, TableConfig], owner: Mapping[str, str], columns: Mapping[str, EntityColumn]
) -> Encoded:
    """Encodes the features of `owner` (feature -> table); features of one table share its id map.

    Vocabularies of users, items and their columns cover all rows that the data keeps, as item rows do.
    """
    codes: dict[str, np.ndarray] = {}
    specs: dict[str, TableSpec] = {}
    maps: dict[str, np.ndarray] = {}
    for name, table in tables.items():
        features = tuple(feature for feature in owner if owner[feature] == name)
        mine = {feature: columns[feature] for feature in features}
        rows = None if table.rows == "auto" else table.rows
        whole = [column for column in mine.values() if column.own]
        seen = {id(one.values): flat(one.values if one.seen is None else one.seen) for one in mine.values()}
        if rows is None and isinstance(table.ids, Vocabulary) and len(whole) == len(mine) and len(seen) == 1:
            values = whole[0].values
            first = int(values.null_count == 0)  # user rows begin at 1: row 0 is for unknown users
            codes |= dict.fromkeys(mine, np.arange(first, first + len(values), dtype=np.int32))
            specs[name] = table.spec(len(values) + first, features)
            maps[f"map.{name}.ids"] = values.drop_null().to_numpy(zero_copy_only=False)
            continue
        fitted = fit_map(table.ids, name, joined(list(seen.values())), rows)
        called: dict[int, str] = {}
        for feature, column in mine.items():
            # Features of one column (`item` and `history`) have one name in a map that keeps features apart.
            same = called.setdefault(id(column.values), feature)
            codes[feature] = padded(column.values, fitted.encode(flat(column.values), same))
        specs[name] = table.spec(fitted.rows, features)
        maps |= {f"map.{name}.{part}": values for part, values in fitted.arrays().items()}
    weights = {name: columns[name].weights for name in owner}
    return Encoded(
        codes, specs, maps, {name: padded_weights(found) for name, found in weights.items() if found is not None}
    )
