"""Click data: examples with categorical features, bags and numbers, encoded for tables, split without a leak.

Vocabularies and statistics are of the training examples alone. Columns of users and items are kept by user and item,
not copied to every example. Tested in tests/data/clicks/test_click_data.py.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int64

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.bags import WEIGHT, flat, joined, padded, padded_weights
from jaxops.data.clicks.columns import Layout, Own, Raw, is_text, layout, read_own, read_raw
from jaxops.data.clicks.examples import Column, ExampleBatches, Examples, ExampleSource
from jaxops.data.clicks.spec import ClickDataConfig, Fractions
from jaxops.data.draws import mixed
from jaxops.data.idmaps import IdMap, fit_map, restore_map
from jaxops.data.ids import Ids
from jaxops.data.protocol import Source
from jaxops.data.slices import by_value, chosen, warm_and_cold


@dataclasses.dataclass(frozen=True, eq=False)
class ClickData:
    """Examples, their parts, and the arrays that serving needs.

    Attributes:
      rows: the number of rows that each table needs, by table.
      features: True where a feature is a bag, by name.
      numeric: names of the numeric columns.
      labels: names of the tasks.
      examples: all examples, encoded.
      parts: rows of the examples of `train`, `valid` and `test`.
      inspection: plain values that describe the data.
      transform: id maps and statistics as named arrays.
    """

    rows: dict[str, int]
    features: dict[str, bool]
    numeric: tuple[str, ...]
    labels: tuple[str, ...]
    examples: Examples
    parts: dict[str, Int64[np.ndarray, " n"]]
    inspection: dict[str, Any]
    transform: dict[str, np.ndarray]

    def source(self, seed: int) -> Source:
        """Returns the training examples, shuffled anew every epoch."""
        return ExampleSource(self.examples, self.parts["train"], seed)

    def batches(self, part: str, size: int) -> ExampleBatches:
        """Returns the examples of `valid` or `test`, in order."""
        return ExampleBatches(self.examples, self.parts[part], size)


def open_clicks(
    config: ClickDataConfig,
    maps: Mapping[str, tuple[IdMap, int | None]],
    tables: Mapping[str, tuple[str, ...]],
    slices: Sequence[str] = (),
) -> ClickData:
    """Reads click data, splits it and encodes it.

    Args:
      config: the data section.
      maps: the id map and the number of rows of each table (None: as many as it needs).
      tables: the features that read each table; features without a table are left out.
      slices: the slices whose masks evaluation batches carry: cold_user, warm_user, cold_item, warm_item, or the values
        of a plain feature.

    Raises:
      UserError: what reading raises; labels that are none; a part of the split that is empty; no such slice.
    """
    with notes.collected() as remarks:
        raw = read_raw(config)
    has, text = layout(config), is_text(config)
    parts = split_examples(config.split, raw)
    for name, at in ((name, at) for name in parts for at in range(len(has.labels))):
        if np.isnan(raw.labels[parts[name], at]).all():
            raise UserError(f"data.labels.{has.labels[at]}: no example of the {name} part has it")
    train = parts["train"]
    features, rows, transform = _encoded(raw, has, maps, tables, train, text)
    for name in set(has.numeric) & set(has.sides):
        transform[f"numbers.{name}"] = np.asarray(raw.values[name])
    numeric = _numeric(has, raw.own, raw.values, raw.of)
    mean, spread = _statistics(numeric[train])
    _refuse_outliers(has.numeric, numeric, train, spread)
    transform |= {"numeric.mean": mean, "numeric.spread": spread} if has.numeric else {}
    cold = {f"cold_{kind}": ~np.isin(of, np.unique(of[train])) for kind, of in raw.of.items()}
    examples = Examples(
        features,
        _standard(numeric, mean, spread),
        raw.labels,
        raw.weight,
        _masks(slices, raw, has, cold),
        raw.of.get("user"),
    )
    return ClickData(
        rows,
        dict(has.features),
        has.numeric,
        has.labels,
        examples,
        parts,
        _inspect(config, raw, parts, cold) | ({"notes": remarks} if remarks else {}),
        transform,
    )


def _encoded(
    raw: Raw,
    has: Layout,
    maps: Mapping[str, tuple[IdMap, int | None]],
    tables: Mapping[str, tuple[str, ...]],
    train: np.ndarray,
    text: bool,
) -> tuple[dict[str, Column], dict[str, int], dict[str, np.ndarray]]:
    """Features as table rows, the rows of each table, and named arrays that make the same maps again."""
    features: dict[str, Column] = {}
    rows: dict[str, int] = {}
    transform = {f"ids.{kind}": np.asarray(ids.values) for kind, ids in raw.ids.items() if kind in has.sides.values()}
    for table, names in tables.items():
        mine = {name: _column(raw, has, name) for name in names if name in has.features}
        ids, wanted = maps[table]
        trained = joined([_of(values, index, train) for values, index in mine.values()])
        fitted = fit_map(ids, table, trained, wanted, text=text)
        for name, (values, index) in mine.items():
            weights = None
            if name in has.weighted:
                weights = padded_weights(_column(raw, has, name, WEIGHT)[0])
            features[name] = Column(padded(values, fitted.encode(flat(values), name)), index, weights)
            if index is not None:
                transform[f"codes.{name}"] = features[name].codes
                transform |= {} if weights is None else {f"weights.{name}": weights}
        rows[table] = fitted.rows
        transform |= {f"map.{table}.{part}": values for part, values in fitted.arrays().items()}
    return features, rows, transform


def _masks(slices: Sequence[str], raw: Raw, has: Layout, cold: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    ready: dict[str, dict[str, np.ndarray]] = {}
    for kind in raw.of:
        ready |= warm_and_cold(kind, cold[f"cold_{kind}"])

    def of(name: str) -> dict[str, np.ndarray]:
        values, index = _column(raw, has, name)
        found = by_value(name, values)
        return found if index is None else {one: mask[index] & (index >= 0) for one, mask in found.items()}

    return chosen(slices, ready, [name for name, bag in has.features.items() if not bag], of)


def new_rows(
    config: ClickDataConfig,
    path: str | os.PathLike[str],
    maps: Mapping[str, IdMap],
    tables: Mapping[str, tuple[str, ...]],
    read: Callable[[str], np.ndarray],
) -> tuple[Examples, Own]:
    """Encodes the rows of a file as examples without labels, with the maps and statistics of a run.

    Columns of users and items hold what training saw. Users and items that training did not see are unknown.

    Args:
      config: the data section of the run.
      path: the file.
      maps: the id map of each table.
      tables: the features that read each table.
      read: returns the run's named arrays.

    Raises:
      UserError: what reading raises.
    """
    own, has = read_own(config, path), layout(config)
    of = {kind: Ids.of(read(f"ids.{kind}"), first=0).positions(own.who[kind]) for kind in set(has.sides.values())}
    features: dict[str, Column] = {}
    for table, names in tables.items():
        fitted = restore_map(maps[table], functools.partial(_named, read, table))
        for name in names:
            if name in has.sides:
                weights = read(f"weights.{name}") if name in has.weighted else None
                features[name] = Column(read(f"codes.{name}"), of[has.sides[name]], weights)
            elif name in has.features:
                values = own.categorical[name]
                weights = padded_weights(own.categorical[f"{name}{WEIGHT}"]) if name in has.weighted else None
                features[name] = Column(padded(values, fitted.encode(flat(values), name)), weights=weights)
    values = {name: read(f"numbers.{name}") for name in set(has.numeric) & set(has.sides)}
    numeric = _numeric(has, own, values, of)
    if has.numeric:
        numeric = _standard(numeric, read("numeric.mean"), read("numeric.spread"))
    count = len(numeric)
    labels = np.zeros((count, len(has.labels)), np.float32)
    return Examples(features, numeric.astype(np.float32), labels, np.ones(count, np.float32), {}), own


def _named(read: Callable[[str], np.ndarray], table: str, part: str) -> np.ndarray:
    return read(f"map.{table}.{part}")


def _column(raw: Raw, has: Layout, name: str, part: str = "") -> tuple[pa.Array, np.ndarray | None]:
    """Returns the values of a feature (with `part`, its weights) and their rows by example (None: one an example)."""
    if name in has.sides:
        return raw.values[f"{name}{part}"], raw.of[has.sides[name]]
    return raw.own.categorical[f"{name}{part}"], None


def split_examples(config: Fractions, raw: Raw) -> dict[str, Int64[np.ndarray, " n"]]:
    """Returns the rows of `train`, `valid` and `test`, each in order of the file.

    Raises:
      UserError: no time or user to split by; a part is empty.
    """
    count = len(raw.labels)
    if config.valid + config.test >= 1:
        raise UserError(f"data.split: valid {config.valid} and test {config.test} leave nothing to train on")
    if config.by in ("time", "user_time") and raw.time is None:
        raise UserError(f"data.split.by: {config.by} needs data.columns.time")
    if config.by == "user_time" and "user" not in raw.of:
        raise UserError("data.split.by: user_time needs data.columns.user")
    place, time = np.arange(count), np.zeros(count) if raw.time is None else raw.time
    if config.by == "random":
        place = np.argsort(mixed(place, np.array([config.seed], np.uint64)), kind="stable")
    elif config.by == "time":
        place = np.argsort(time, kind="stable")
    share = np.empty(count)
    share[place] = (np.arange(count) + 0.5) / count
    if config.by == "user_time":
        who = raw.of["user"] + 1  # examples of nobody, -1, are split among themselves
        order = np.lexsort((time, who))
        sizes = np.bincount(who)
        first = np.cumsum(sizes) - sizes
        user = who[order]
        share[order] = (np.arange(count) - first[user] + 0.5) / sizes[user]
    which = (share >= 1 - config.valid - config.test).astype(int) + (share >= 1 - config.test)
    parts = {name: np.flatnonzero(which == at) for at, name in enumerate(("train", "valid", "test"))}
    for name, rows in parts.items():
        if not len(rows):
            raise UserError(f"data.split: the {name} part is empty ({count} examples, by {config.by})")
    return parts


def _of(values: pa.Array, index: np.ndarray | None, examples: np.ndarray) -> pa.Array:
    """Returns the values of these examples; bags are flattened."""
    rows = examples if index is None else index[examples]
    return flat(values.take(pa.array(rows, mask=rows < 0)))


def _numeric(
    has: Layout, own: Own, values: Mapping[str, Any], of: Mapping[str, np.ndarray]
) -> Float64[np.ndarray, "examples numbers"]:
    """Returns the numbers before they are standardised, NaN where there is none."""
    columns = []
    for name in has.numeric:
        found = own.numeric[name] if name not in has.sides else np.asarray(values[name])
        wide = np.sign(found) * np.log1p(np.abs(found)) if has.log else found
        if name in has.sides:
            at = of[has.sides[name]]
            wide = np.where(at < 0, np.nan, wide[at])
        columns.append(wide)
    count = len(next(iter((own.categorical | own.numeric).values())))
    return np.stack(columns, axis=1) if columns else np.zeros((count, 0))


def _statistics(numeric: Float64[np.ndarray, "examples numbers"]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the standard deviation of each column over the values that there are."""
    known = [column[~np.isnan(column)] for column in numeric.T]
    means = np.array([seen.mean() if len(seen) else 0.0 for seen in known])
    spreads = np.array([seen.std() if len(seen) else 1.0 for seen in known])
    return means, np.where(spreads > 1e-12, spreads, 1.0)


def _refuse_outliers(names: Sequence[str], numeric: np.ndarray, train: np.ndarray, spread: np.ndarray) -> None:
    """Refuses a column in which a few values are so large that float32 no longer tells the others apart."""
    for at, name in enumerate(names):
        seen = numeric[train, at]
        known = seen[~np.isnan(seen)]
        low, middle, high = np.quantile(known, (0.25, 0.5, 0.75)) if len(known) else (0.0, 0.0, 0.0)
        if 0 < high - low < 1e-6 * spread[at]:
            row = train[int(np.nanargmax(np.abs(seen - middle)))]
            raise UserError(
                f"data.numeric: {name}: row {row + 1} is {numeric[row, at]:g}, so large beside the middle half of the"
                f" column ({low:g} to {high:g}) that those would be one number; is it a placeholder? drop it, or set"
                " data.log"
            )


def _standard(numeric: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> Float32[np.ndarray, "examples numbers"]:
    """Standardises by mean and spread; a missing number becomes 0."""
    return np.nan_to_num((numeric - mean) / spread, nan=0.0).astype(np.float32)


def _inspect(
    config: ClickDataConfig, raw: Raw, parts: Mapping[str, np.ndarray], cold: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for rows in parts.values():
        digest.update(np.ascontiguousarray(rows, "<i8").tobytes())
        digest.update(np.ascontiguousarray(raw.labels[rows], "<f4").tobytes())
    out: dict[str, Any] = {
        "kind": config.kind,
        "path": getattr(config, "path", None),
        "split": {"kind": config.split.by, "sha256": digest.hexdigest()},
    }
    out |= {"dropped": {"duplicate_examples": raw.copies}} if raw.copies else {}
    out |= {name: dataclasses.asdict(join) for name, join in raw.joins.items()}
    for name, rows in parts.items():
        out[f"{name}_examples"] = len(rows)
        for at, task in enumerate(layout(config).labels):
            out[f"{name}_rate_{task}"] = round(float(np.nanmean(raw.labels[rows, at])), 6)
        out |= {f"{name}_{what}": int(mask[rows].sum()) for what, mask in cold.items()}
    return out
