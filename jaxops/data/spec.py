"""How data is written down in a config: frozen dataclasses and nothing else (`config.py` opens them)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

Format = Literal["auto", "csv", "tsv", "jsonl", "parquet"]
TimeUnit = Literal["s", "ms", "us", "ns"]
Moment = str | int | float
"""An ISO date or time (UTC unless it says otherwise) or unix seconds."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which column is what. `time: null` keeps the order of the rows; no `weight` is 1 for every event.

    Numbers in the time column are unix times in `time_unit`; strings are ISO 8601, UTC unless they say
    otherwise. `context` columns say under which circumstances an event came about (device, hour, shelf).
    """

    user: str = "user"
    item: str = "item"
    time: str | None = "time"
    weight: str | None = None
    time_unit: TimeUnit = "s"
    context: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MinCount:
    """Users and items with fewer events are dropped, repeatedly, until all left have enough (a k-core)."""

    user: Annotated[int, Field(ge=1)] = 1
    item: Annotated[int, Field(ge=1)] = 1


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """Each user's last event is the test target, the one before it the validation target."""

    kind: Literal["leave_one_out"] = "leave_one_out"


@dataclasses.dataclass(frozen=True)
class GlobalTime:
    """Train before `valid_from`; the first event from there validates, the first from `test_from` tests."""

    valid_from: Moment
    test_from: Moment
    kind: Literal["global_time"] = "global_time"


SplitConfig = LeaveOneOut | GlobalTime


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideFile:
    """Columns of users or items from a file of their own, joined by `key`; `bags` are text apart by `separator`.

    `weights`, by bag: the column that says how much each of its values counts, as many numbers apart in the same way.
    `numeric` columns are for click models, which read numbers.
    """

    path: str | tuple[str, ...]
    key: str
    columns: tuple[str, ...] = ()
    bags: tuple[str, ...] = ()
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    numeric: tuple[str, ...] = ()
    separator: str = "|"
    format: Format = "auto"
    header: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClickColumns:
    """Which columns say whose an example is, of what, when, and how much it counts; null: there is none."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    weight: str | None = None


@dataclasses.dataclass(frozen=True)
class MovieLens100K:
    """MovieLens-100K, fetched by `jaxops data get movielens_100k` or at first use."""

    kind: Literal["movielens_100k"] = "movielens_100k"
    min_count: MinCount = MinCount()
    split: SplitConfig = LeaveOneOut()


@dataclasses.dataclass(frozen=True)
class InteractionsFile:
    """One's own events: files, globs, folders (hive partitions too) of CSV, TSV, JSONL or Parquet.

    `header` names the columns of text files that have no header line. `cache` is a folder for the
    memory-mapped copy that is built once and rebuilt when the inputs change; without it the events are read
    into memory.
    """

    path: str | tuple[str, ...]
    kind: Literal["interactions"] = "interactions"
    columns: Columns = Columns()
    min_count: MinCount = MinCount()
    split: SplitConfig = LeaveOneOut()
    cache: str | None = None
    format: Format = "auto"
    header: tuple[str, ...] | None = None
    user_features: SideFile | None = None
    item_features: SideFile | None = None


@dataclasses.dataclass(frozen=True)
class SequencesFile:
    """A text file with one user a line, `user item item ...` in time order."""

    path: str
    kind: Literal["sequences"] = "sequences"
    split: SplitConfig = LeaveOneOut()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """What is predicted: a column of 0 and 1, or whether a number is `at_least` so much."""

    column: str
    at_least: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fractions:
    """The last `valid` + `test` of the examples are held out, the very last for test.

    Last `by`: `order` of the rows; `time`; `user_time`, each user's own last; or `random`, by a hash of the row.
    """

    kind: Literal["fractions"] = "fractions"
    valid: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    by: Literal["order", "time", "user_time", "random"] = "order"
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClicksFile:
    """Examples of clicks: a row each, in files of any format that interactions may have.

    `labels` by name of the task; `bags` are text apart by `separator` (or lists, in Parquet) and `weights`, by bag, the
    column that says how much each of its values counts, in the same form. `numeric` columns are standardised by the
    training examples, after sign(x) log(1 + |x|) where `log`. `columns` say who and what, for splits, GAUC and cold
    users and items; they are features where `categorical` names them too.
    """

    path: str | tuple[str, ...]
    kind: Literal["clicks"] = "clicks"
    labels: Mapping[str, Label] = dataclasses.field(default_factory=lambda: {"click": Label(column="label")})
    columns: ClickColumns = ClickColumns()
    categorical: tuple[str, ...] = ()
    bags: tuple[str, ...] = ()
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    separator: str = "|"
    numeric: tuple[str, ...] = ()
    log: bool = False
    user_features: SideFile | None = None
    item_features: SideFile | None = None
    split: Fractions = Fractions()
    format: Format = "auto"
    header: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criteo:
    """Click logs in Criteo's form: label, integers i1..i13, categories c1..c26, apart by tabs, no header."""

    path: str | tuple[str, ...]
    kind: Literal["criteo"] = "criteo"
    split: Fractions = Fractions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovieLensClicks:
    """MovieLens-100K as clicks: would a person rate this film `at_least` so high?

    Features: user, item, age, gender, occupation, hour, weekday, the film's genre (a bag) and year (a number).
    """

    kind: Literal["movielens_100k_clicks"] = "movielens_100k_clicks"
    at_least: float = 4.0
    split: Fractions = Fractions(by="user_time")


ClickDataConfig = ClicksFile | Criteo | MovieLensClicks
RecDataConfig = MovieLens100K | InteractionsFile | SequencesFile | ClicksFile | Criteo | MovieLensClicks
