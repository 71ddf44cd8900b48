"""Click data: examples with categorical features, bags and numbers, encoded for tables, split without a leak.

Vocabularies and statistics are the training examples' alone. Columns of users and items are kept by user and item,
not copied to every example. Held by tests/data/test_click_data.py.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Int64

from jaxops.core.failures import UserError
from jaxops.data import side, sources
from jaxops.data.bags import flat, joined, padded
from jaxops.data.examples import Column, ExampleBatches, Examples, ExampleSource
from jaxops.data.idmaps import Fitted, IdMap, fit_map
from jaxops.data.ids import Ids, sortable
from jaxops.data.numeric import numbers, times, weights
from jaxops.data.protocol import Source
from jaxops.data.spec import (
    ClickDataConfig,
    ClicksFile,
    Criteo,
    Fractions,
    Label,
    MovieLensClicks,
    SideFile,
)
from jaxops.data.windows import mixed

INTEGERS = tuple(f"i{at}" for at in range(1, 14))
CATEGORIES = tuple(f"c{at}" for at in range(1, 27))
RESERVED = ("id", "weight", "label", "numeric", "rows", "cold_user", "cold_item")
"""What else a batch has by name."""


@dataclasses.dataclass(frozen=True, eq=False)
class ClickData:
    """Examples, their parts, and what is frozen of them.

    Attributes:
      rows: by table, how many it needs.
      features: by name, whether it is a bag.
      labels: names of the tasks.
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
        """The training examples, in an order of each epoch's own."""
        return ExampleSource(self.examples, self.parts["train"], seed)

    def batches(self, part: str, size: int) -> ExampleBatches:
        """`valid` or `test`, in order."""
        return ExampleBatches(self.examples, self.parts[part], size)


def open_clicks(
    config: ClickDataConfig, maps: Mapping[str, tuple[IdMap, int | None]], tables: Mapping[str, tuple[str, ...]]
) -> ClickData:
    """Reads, splits and encodes.

    Args:
      maps: by table, its id map and rows (None: as many as it needs).
      tables: by table, the features that read it; features without one are left out.

    Raises:
      UserError: what reading raises; labels that are none; a part of the split that is empty.
    """
    raw = _movielens(config) if isinstance(config, MovieLensClicks) else _file(_as_file(config))
    parts = split(config.split, raw)
    for name, at in ((name, at) for name in parts for at in range(len(raw.tasks))):
        if np.isnan(raw.labels[parts[name], at]).all():
            raise UserError(f"data.labels.{raw.tasks[at]}: no example of the {name} part has it")
    train = parts["train"]
    features: dict[str, Column] = {}
    rows: dict[str, int] = {}
    transform: dict[str, np.ndarray] = {}
    for table, names in tables.items():
        mine = {name: raw.categorical[name] for name in names if name in raw.categorical}
        ids, wanted = maps[table]
        fitted = fit_map(ids, table, joined([_of(values, index, train) for values, index in mine.values()]), wanted)
        features |= {name: _encoded(fitted, name, values, index) for name, (values, index) in mine.items()}
        rows[table] = fitted.rows
        transform |= {f"map.{table}.{part}": values for part, values in fitted.arrays().items()}
    numeric, statistics = _standardised(raw, train)
    transform |= statistics
    who = {name: codes for name, codes in (("user", raw.user), ("item", raw.item)) if codes is not None}
    cold = {f"cold_{name}": ~np.isin(codes, np.unique(codes[train])) for name, codes in who.items()}
    examples = Examples(features, numeric, raw.labels, raw.weight, cold, raw.user)
    bags = {name: pa.types.is_list(values.type) for name, (values, _) in raw.categorical.items()}
    return ClickData(
        rows, bags, tuple(raw.numeric), raw.tasks, examples, parts, _inspect(config, raw, parts, cold), transform
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Raw:
    """Columns as they were read. A feature is (values, the row of them for each example, or None for its own)."""

    categorical: dict[str, tuple[pa.Array, np.ndarray | None]]
    numeric: dict[str, tuple[np.ndarray, np.ndarray | None]]
    log: bool
    tasks: tuple[str, ...]
    labels: Float32[np.ndarray, "examples tasks"]
    weight: Float32[np.ndarray, " examples"]
    user: np.ndarray | None
    item: np.ndarray | None
    time: np.ndarray | None


def _as_file(config: ClicksFile | Criteo) -> ClicksFile:
    if isinstance(config, ClicksFile):
        return config
    return ClicksFile(
        path=config.path,
        labels={"click": Label(column="label")},
        categorical=CATEGORIES,
        numeric=INTEGERS,
        log=True,
        split=config.split,
        format="tsv",
        header=("label", *INTEGERS, *CATEGORIES),
    )


def _file(config: ClicksFile) -> _Raw:
    columns = config.columns
    who = [name for name in dataclasses.astuple(columns) if name is not None]
    labels = [label.column for label in config.labels.values()]
    own = [*config.categorical, *config.bags, *config.numeric]
    if not config.labels or not own:
        raise UserError("data: name at least one label and one column of `categorical`, `bags` or `numeric`")
    _check_names(config)
    plain_numbers = {*labels, *config.numeric, *(name for name in (columns.time, columns.weight) if name is not None)}
    table = side.read_columns(
        config.path,
        list(dict.fromkeys([*who, *labels, *own])),
        config.format,
        config.header,
        plain_numbers - {*config.categorical, columns.user, columns.item},
    )
    categorical: dict[str, tuple[pa.Array, np.ndarray | None]]
    categorical = {name: (side.column(table, name), None) for name in config.categorical}
    categorical |= {name: (side.column(table, name, config.separator), None) for name in config.bags}
    codes: dict[str, np.ndarray | None] = {"user": None, "item": None}
    files: dict[str, SideFile | None] = {"user": config.user_features, "item": config.item_features}
    for kind, name in (("user", config.columns.user), ("item", config.columns.item)):
        if name is None:
            if files[kind] is not None:
                raise UserError(f"data.{kind}_features: say which column is the {kind}, data.columns.{kind}")
            continue
        encoded = side.column(table, name).dictionary_encode()
        codes[kind] = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        if (one := files[kind]) is not None:
            values, order = _by_id(encoded.dictionary, kind)
            found = side.read_side(one, values, f"data.{kind}_features")
            categorical |= {feature: (column, order[codes[kind]]) for feature, column in found.items()}
    time, weight = None, np.ones(len(table), np.float32)
    if columns.time is not None and config.split.by in ("time", "user_time"):
        time = times(side.whole(table, columns.time), "data.columns.time")
    if config.columns.weight is not None:
        weight = weights(side.column(table, config.columns.weight), "data.columns.weight")
    given = [_label(side.column(table, label.column), label, name) for name, label in config.labels.items()]
    numeric: dict[str, tuple[np.ndarray, np.ndarray | None]]
    numeric = {name: (numbers(side.column(table, name), f"data.numeric: {name}"), None) for name in config.numeric}
    return _Raw(
        categorical,
        numeric,
        config.log,
        tuple(config.labels),
        np.stack(given, axis=1),
        weight,
        codes["user"],
        codes["item"],
        time,
    )


def _check_names(config: ClicksFile) -> None:
    """Every feature has one name of its own: batches are by name, and a later one would take an earlier one's place."""
    named = [("data.categorical", config.categorical), ("data.bags", config.bags)]
    for path, file in (("data.user_features", config.user_features), ("data.item_features", config.item_features)):
        if file is not None:
            named += [(f"{path}.columns", file.columns), (f"{path}.bags", file.bags)]
    owner: dict[str, str] = {}
    for path, names in named:
        for name in names:
            if name in RESERVED:
                raise UserError(
                    f"{path}: a feature cannot be called {name!r}, as another entry of batches is; rename the column"
                )
            if name in owner:
                raise UserError(f"{path}: {name!r} is named by {owner[name]} already; one of them must be renamed")
            owner[name] = path


def _by_id(values: pa.Array, what: str) -> tuple[Ids, np.ndarray]:
    """The distinct ids in sorted order, and where each of `values` is there (the last, -1: a null, is a spare)."""
    known = sortable(values.to_pylist(), False, what)
    order = np.argsort(known, kind="stable")
    place = np.empty(len(order) + 1, np.int64)
    place[order], place[-1] = np.arange(len(order)), -1
    return Ids(known[order], first=0), place


def _movielens(config: MovieLensClicks) -> _Raw:
    header = ("user", "item", "rating", "time")
    table = side.read_columns(str(sources.get("movielens_100k")), header, "tsv", header)
    people = side.read_columns(str(sources.get("movielens_100k_people")), ["user", "age", "gender", "occupation"])
    films = side.read_columns(str(sources.get("movielens_100k_films")), ["item", "year", "genres"])
    user, item = side.column(table, "user"), side.column(table, "item")
    person = np.asarray(pc.index_in(user, side.column(people, "user")))
    film = np.asarray(pc.index_in(item, side.column(films, "item")))
    time = numbers(side.column(table, "time"), "time")
    years = numbers(side.column(films, "year"), "year")
    categorical: dict[str, tuple[pa.Array, np.ndarray | None]] = {"user": (user, None), "item": (item, None)}
    categorical |= {name: (side.column(people, name), person) for name in ("age", "gender", "occupation")}
    categorical["genre"] = (side.column(films, "genres", "|"), film)
    categorical["hour"] = (pa.array((time // 3600 % 24).astype(np.int64)), None)
    categorical["weekday"] = (pa.array((time // 86400 % 7).astype(np.int64)), None)
    label = _label(side.column(table, "rating"), Label(column="rating", at_least=config.at_least), "like")
    weight = np.ones(len(table), np.float32)
    return _Raw(categorical, {"year": (years, film)}, False, ("like",), label[:, None], weight, person, film, time)


def _label(values: pa.Array, label: Label, name: str) -> np.ndarray:
    found = numbers(values, f"data.labels.{name}: column {label.column!r}")
    if label.at_least is not None:
        return np.where(np.isnan(found), np.nan, found >= label.at_least).astype(np.float32)
    wrong = np.flatnonzero(~np.isnan(found) & (found != 0) & (found != 1))
    if len(wrong):
        raise UserError(
            f"data.labels.{name}: row {wrong[0] + 1} of column {label.column!r} is {found[wrong[0]]:g}, expected 0 or 1"
            f" (or `at_least`: from where on a number counts as a click)"
        )
    return found.astype(np.float32)


def split(config: Fractions, raw: Any) -> dict[str, Int64[np.ndarray, " n"]]:
    """Rows of `train`, `valid` and `test`, each in order of the file.

    Raises:
      UserError: no time or user to split by; a part is empty.
    """
    count = len(raw.labels)
    if config.valid + config.test >= 1:
        raise UserError(f"data.split: valid {config.valid} and test {config.test} leave nothing to train on")
    if config.by in ("time", "user_time") and raw.time is None:
        raise UserError(f"data.split.by: {config.by} needs data.columns.time")
    if config.by == "user_time" and raw.user is None:
        raise UserError("data.split.by: user_time needs data.columns.user")
    place = np.arange(count)
    if config.by == "random":
        place = np.argsort(mixed(place, np.array([config.seed], np.uint64)), kind="stable")
    elif config.by == "time":
        place = np.argsort(raw.time, kind="stable")
    share = np.empty(count)
    share[place] = (np.arange(count) + 0.5) / count
    if config.by == "user_time":
        who = raw.user + 1  # examples of nobody, -1, are split among themselves
        order = np.lexsort((raw.time, who))
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
    """The values of these examples, bags flattened."""
    rows = examples if index is None else index[examples]
    return flat(values.take(pa.array(rows, mask=rows < 0)))


def _encoded(fitted: Fitted, name: str, values: pa.Array, index: np.ndarray | None) -> Column:
    return Column(padded(values, fitted.encode(flat(values), name)), index)


def _standardised(raw: _Raw, train: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """[examples, numbers] float32, by mean and spread of the training examples; 0 where there is none."""
    columns, means, spreads = [], [], []
    for values, index in raw.numeric.values():
        wide = np.sign(values) * np.log1p(np.abs(values)) if raw.log else values
        wide = wide if index is None else wide[index]
        seen = wide[train][~np.isnan(wide[train])]
        mean, spread = (float(seen.mean()), float(seen.std())) if len(seen) else (0.0, 1.0)
        spread = spread if spread > 1e-12 else 1.0
        columns.append(np.nan_to_num((wide - mean) / spread, nan=0.0).astype(np.float32))
        means.append(mean)
        spreads.append(spread)
    if not columns:
        return np.zeros((len(raw.labels), 0), np.float32), {}
    return np.stack(columns, axis=1), {"numeric.mean": np.array(means), "numeric.spread": np.array(spreads)}


def _inspect(
    config: ClickDataConfig, raw: _Raw, parts: Mapping[str, np.ndarray], cold: Mapping[str, np.ndarray]
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
    for name, rows in parts.items():
        out[f"{name}_examples"] = len(rows)
        for at, task in enumerate(raw.tasks):
            out[f"{name}_rate_{task}"] = round(float(np.nanmean(raw.labels[rows, at])), 6)
        out |= {f"{name}_{what}": int(mask[rows].sum()) for what, mask in cold.items()}
    return out
