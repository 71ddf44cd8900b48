"""Columns of click data as they stand in files: of training data, and of new rows that are to be predicted."""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64

from jaxops.core.failures import UserError
from jaxops.data import notes, side, sources
from jaxops.data.clicks.spec import ClickDataConfig, ClicksFile, Criteo, Label, MovieLensClicks
from jaxops.data.files import expand_paths
from jaxops.data.ids import Ids, settle
from jaxops.data.moments import Granularity
from jaxops.data.numeric import numbers, times, weights
from jaxops.data.spec import SideFile, name_owners

INTEGERS = tuple(f"i{at}" for at in range(1, 14))
CATEGORIES = tuple(f"c{at}" for at in range(1, 27))
RESERVED = ("id", "weight", "label", "numeric", "rows", "plan", "slots")
"""Names of other entries of a batch, which no feature may have."""
KINDS = ("user", "item")


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The features and labels that click data has by its config alone.

    Attributes:
      features: True where a feature is a bag, by name, in the order in which models read them.
      numeric: names of the numeric columns.
      sides: `user` or `item`, by the name of a column of users or items.
      labels: names of the tasks.
      log: True where numbers are compressed, sign(x) log(1 + |x|), before they are standardised.
      weighted: bags whose values have weights.
    """

    features: Mapping[str, bool]
    numeric: tuple[str, ...]
    sides: Mapping[str, str]
    labels: tuple[str, ...]
    log: bool
    weighted: frozenset[str] = frozenset()


def layout(config: ClickDataConfig) -> Layout:
    """Returns the layout that a config describes."""
    if isinstance(config, MovieLensClicks):
        own = dict.fromkeys(("user", "item", "age", "gender", "occupation"), False)
        features = {**own, "genre": True, "hour": False, "weekday": False}
        sides = {**dict.fromkeys(("age", "gender", "occupation"), "user"), "genre": "item", "year": "item"}
        return Layout(features, ("year",), sides, ("like",), False)
    config = as_clicks_file(config)
    features = {**dict.fromkeys(config.categorical, False), **dict.fromkeys(config.bags, True)}
    sides, weighted, numeric = {}, {*config.weights}, [*config.numeric]
    for kind, file in zip(KINDS, (config.user_features, config.item_features), strict=True):
        if file is not None:
            features |= {**dict.fromkeys(file.columns, False), **dict.fromkeys(file.bags, True)}
            sides |= dict.fromkeys((*file.columns, *file.bags, *file.numeric), kind)
            weighted |= {*file.weights}
            numeric += file.numeric
    return Layout(features, tuple(numeric), sides, tuple(config.labels), config.log, frozenset(weighted))


@dataclasses.dataclass(frozen=True, eq=False)
class Own:
    """Columns of the examples themselves; `who` holds the original ids of their users and items, where they are known.

    The weights of a bag are `NAME/weight` of `categorical`.
    """

    categorical: dict[str, pa.Array]
    numeric: dict[str, Float64[np.ndarray, " rows"]]
    who: dict[str, pa.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Raw:
    """Training data as it was read.

    Attributes:
      own: the columns of the examples themselves.
      values: columns of users and items by their row in `ids`; a bag has a list a row, numbers are float64.
      ids: the distinct users and items, by `user` and `item`.
      of: the row of each example in `ids`, int64, -1 for nobody, by `user` and `item`.
      labels: one column a task, NaN where an example has no label.
      weight: the weight of each example.
      time: the time of each example, where the split needs it.
      joins: how each side file was joined.
      copies: exact copies of examples that were dropped.
    """

    own: Own
    values: dict[str, pa.Array | np.ndarray]
    ids: dict[str, Ids]
    of: dict[str, np.ndarray]
    labels: Float32[np.ndarray, "examples tasks"]
    weight: Float32[np.ndarray, " examples"]
    time: np.ndarray | None
    joins: dict[str, side.Join] = dataclasses.field(default_factory=dict)
    copies: int = 0


def read_raw(config: ClickDataConfig) -> Raw:
    """Reads all columns of the training data.

    Raises:
      UserError: what reading raises; names that clash; labels, weights or times that are none.
    """
    return _movielens(config) if isinstance(config, MovieLensClicks) else _file(as_clicks_file(config))


def read_own(config: ClickDataConfig, path: str | os.PathLike[str]) -> Own:
    """Reads rows to be predicted: the columns of the training data without labels, weights and times.

    The columns of users and items may be absent, unless a feature is a column of users or items.

    Raises:
      UserError: what reading raises.
    """
    if isinstance(config, MovieLensClicks):
        return _film_columns(side.read_columns(os.fspath(path), ("user", "item", "time")))
    file, has = as_clicks_file(config), layout(config)
    path = os.fspath(path)
    there = side.columns_of(path, file.format, file.header, file.text)
    who = {kind: name for kind, name in _who(file).items() if name in there or kind in has.sides.values()}
    wanted = [*file.categorical, *file.bags, *file.weights.values(), *file.numeric, *who.values()]
    table = side.read_columns(path, list(dict.fromkeys(wanted)), file.format, file.header, _numbers(file), file.text)
    return _own(file, table, who)


def given_columns(config: ClickDataConfig, path: str | os.PathLike[str]) -> pa.Table:
    """Reads all columns of a file unchanged, so that predictions can be joined to its rows.

    Raises:
      UserError: what reading raises.
    """
    path = os.fspath(path)
    file = ClicksFile(path=path) if isinstance(config, MovieLensClicks) else as_clicks_file(config)
    names = side.columns_of(path, file.format, file.header, file.text)
    return side.read_columns(path, names, file.format, file.header, text=file.text)


def as_clicks_file(config: ClicksFile | Criteo) -> ClicksFile:
    """Returns the config of a file with columns that reads the same; Criteo's form is one."""
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


def is_text(config: ClickDataConfig) -> bool:
    """True where the files are of a format that cannot tell integers from text."""
    if isinstance(config, MovieLensClicks):
        return False
    file = as_clicks_file(config)
    return expand_paths(file.path, file.format)[0].format in ("csv", "tsv")


def _who(config: ClicksFile) -> dict[str, str]:
    """Returns the names of the columns of users and items, by `user` and `item`."""
    found = {"user": config.columns.user, "item": config.columns.item}
    return {kind: name for kind, name in found.items() if name is not None}


def _numbers(config: ClicksFile) -> set[str]:
    """Returns the columns that are read as numbers and as nothing else."""
    columns = config.columns
    labels = [label.column for label in config.labels.values()]
    plain = {*labels, *config.numeric, *(name for name in (columns.time, columns.weight) if name is not None)}
    return plain - {*config.categorical, *_who(config).values()}


def _own(config: ClicksFile, table: pa.Table, who: Mapping[str, str]) -> Own:
    categorical = {name: side.column(table, name) for name in config.categorical}
    categorical |= side.bags(table, config.bags, config.weights, config.separator, "data")
    return Own(
        categorical,
        {name: numbers(side.column(table, name), f"data.numeric: {name}") for name in config.numeric},
        {kind: side.column(table, name) for kind, name in who.items()},
    )


def _file(config: ClicksFile) -> Raw:
    columns = config.columns
    labels = [label.column for label in config.labels.values()]
    features = [*config.categorical, *config.bags, *config.numeric]
    if not config.labels or not features:
        raise UserError("data: name at least one label and one column of `categorical`, `bags` or `numeric`")
    _check_names(config)
    named = [name for name in (columns.time, columns.weight) if name is not None]
    wanted = [*_who(config).values(), *named, *labels, *features, *config.weights.values()]
    names = list(dict.fromkeys(wanted))
    table = side.read_columns(config.path, names, config.format, config.header, _numbers(config), config.text)
    own = _own(config, table, _who(config))
    files: dict[str, SideFile | None] = {"user": config.user_features, "item": config.item_features}
    values: dict[str, pa.Array | np.ndarray] = {}
    ids, of, joins = {}, {}, {}
    for kind, file in files.items():
        if kind in own.who:
            ids[kind], of[kind] = _by_id(own.who[kind], f"data.columns.{kind}", is_text(config))
        elif file is not None:
            raise UserError(f"data.{kind}_features: say which column is the {kind}, data.columns.{kind}")
        if file is not None:
            found, joins[f"{kind}_features"] = side.join_side(file, ids[kind], f"data.{kind}_features")
            values |= found
    time, weight = None, np.ones(len(table), np.float32)
    if columns.time is not None and config.split.by in ("time", "user_time"):
        time = times(side.whole(table, columns.time), "data.columns.time")
    if columns.weight is not None:
        weight = weights(side.column(table, columns.weight), "data.columns.weight")
    given = [_label(side.column(table, label.column), label, name) for name, label in config.labels.items()]
    raw = Raw(own, values, ids, of, np.stack(given, axis=1), weight, time, joins)
    return _without_copies(raw, table, config)


def _without_copies(raw: Raw, table: pa.Table, config: ClicksFile) -> Raw:
    """The examples without exact copies, which a split would put on both of its sides, unless `duplicates` keeps them.

    Where there are no times that are finer than a day, copies and honest repeats look the same and stay.
    """
    if config.duplicates == "keep":
        return raw
    if config.duplicates == "auto" and (config.columns.time is None or _dates_alone(table, config.columns.time)):
        return raw
    group = np.zeros(len(table), np.int64)
    for name in table.column_names:
        values = side.whole(table, name)
        if pa.types.is_nested(values.type):
            values = pa.array([str(value) for value in values.to_pylist()])
        codes = values.dictionary_encode(null_encoding="encode").indices.to_numpy(zero_copy_only=False)
        group = np.unique(group * (int(codes.max(initial=0)) + 1) + codes, return_inverse=True)[1]
    first = np.sort(np.unique(group, return_index=True)[1])
    copies = len(table) - len(first)
    if not copies:
        return raw
    notes.tell(
        f"{copies:,} example(s) are exact copies of another (the same in all columns that are read) and were dropped;"
        " data.duplicates: keep keeps them"
    )
    taken = lambda named: {name: values.take(pa.array(first)) for name, values in named.items()}
    own = Own(taken(raw.own.categorical), {k: v[first] for k, v in raw.own.numeric.items()}, taken(raw.own.who))
    return dataclasses.replace(
        raw,
        own=own,
        of={kind: rows[first] for kind, rows in raw.of.items()},
        labels=raw.labels[first],
        weight=raw.weight[first],
        time=None if raw.time is None else raw.time[first],
        copies=copies,
    )


def _dates_alone(table: pa.Table, name: str) -> bool:
    values = side.whole(table, name).drop_null()
    clock = Granularity()
    clock.add(times(values, "data.columns.time"))
    return clock.dates_alone


def _check_names(config: ClicksFile) -> None:
    """Refuses names that clash: batches are by name, and a later feature would replace an earlier one."""
    owner = name_owners([("data.categorical", config.categorical), ("data.bags", config.bags)], RESERVED)
    sides = []
    for path, file in (("data.user_features", config.user_features), ("data.item_features", config.item_features)):
        if file is not None:
            sides += [(f"{path}.columns", file.columns), (f"{path}.bags", file.bags), (f"{path}.numeric", file.numeric)]
    name_owners(sides, RESERVED, dict.fromkeys(config.numeric, "data.numeric") | owner)


def _by_id(values: pa.Array, what: str, text: bool = False) -> tuple[Ids, np.ndarray]:
    """Returns the distinct ids in sorted order, and the row of each of `values` among them, int64 (-1: null)."""
    encoded = values.dictionary_encode()
    settled = settle(encoded.dictionary.to_pylist(), text, what, integers=False)
    order = np.argsort(settled.values, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return Ids(settled.values[order], first=0), np.append(place[settled.index], -1)[codes]


def _film_columns(table: pa.Table) -> Own:
    who = {kind: side.column(table, kind) for kind in KINDS}
    time = numbers(side.column(table, "time"), "time")
    hour, day = ((time // seconds % cycle).astype(np.int64) for seconds, cycle in ((3600, 24), (86400, 7)))
    return Own({**who, "hour": pa.array(hour), "weekday": pa.array(day)}, {}, who)


def _movielens(config: MovieLensClicks) -> Raw:
    header = ("user", "item", "rating", "time")
    table = side.read_columns(str(sources.get("movielens_100k")), header, "tsv", header)
    people = side.read_columns(str(sources.get("movielens_100k_people")), ["user", "age", "gender", "occupation"])
    films = side.read_columns(str(sources.get("movielens_100k_films")), ["item", "year", "genres"])
    own = _film_columns(table)
    ids, of, lies = {}, {}, {}
    for kind, known in zip(KINDS, (people, films), strict=True):
        ids[kind], place = _by_id(side.column(known, kind), kind)
        lies[kind] = pa.array(np.argsort(place))
        of[kind] = ids[kind].positions(own.who[kind])
    values = {name: side.column(people, name).take(lies["user"]) for name in ("age", "gender", "occupation")}
    values["genre"] = side.column(films, "genres", "|").take(lies["item"])
    year = numbers(side.column(films, "year"), "year")[np.asarray(lies["item"])]
    label = _label(side.column(table, "rating"), Label(column="rating", at_least=config.at_least), "like")
    time = numbers(side.column(table, "time"), "time")
    return Raw(own, {**values, "year": year}, ids, of, label[:, None], np.ones(len(table), np.float32), time)


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
