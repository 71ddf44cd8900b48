"""The config of click data: frozen dataclasses and nothing else (`clicks.py` opens them)."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jaxops.config.part import Part
from jaxops.data.spec import Duplicates, Format, SideFile, TextFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClickColumns:
    """Names of the columns that hold an example's user, item, time and weight; null where there is none."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    weight: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """A label to predict: a column of 0 and 1, or of numbers that count as 1 from `at_least` on."""

    column: str
    at_least: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fractions:
    """The last `valid` + `test` of the examples are held out, the very last for test.

    `by` says what last means: `order` of the rows; `time`; `user_time`, each user's own last; `random`, by a hash of
    the row.
    """

    kind: Literal["fractions"] = "fractions"
    valid: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    by: Literal["order", "time", "user_time", "random"] = "order"
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClicksFile(Part):
    """Examples of clicks, one a row, in files of any format that interactions may have.

    `labels` are by name of the task. `bags` are text apart by `separator` (or lists, in Parquet). `weights` names, by
    bag, the column of the weights of its values, in the same form. `numeric` columns are standardised by the training
    examples, after sign(x) log(1 + |x|) where `log`. `columns` name users, items, times and weights, for splits, GAUC
    and cold users and items; they are features where `categorical` names them too. `duplicates` is the treatment of
    examples that are equal in every column that is read: `auto` drops and counts them where there are times finer than
    a day. `header` and `text` are for CSV and TSV.
    """

    sort: ClassVar[str] = "clicks"

    path: str | tuple[str, ...]
    kind: Literal["clicks"] = "clicks"
    labels: Mapping[str, Label] = dataclasses.field(default_factory=lambda: {"click": Label(column="label")})
    columns: ClickColumns = ClickColumns()
    categorical: tuple[str, ...] = ()
    bags: tuple[str, ...] = ()
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    separator: Annotated[str, Field(min_length=1)] = "|"
    numeric: tuple[str, ...] = ()
    log: bool = False
    user_features: SideFile | None = None
    item_features: SideFile | None = None
    split: Fractions = Fractions()
    format: Format = "auto"
    header: tuple[str, ...] | None = None
    text: TextFormat = TextFormat()
    duplicates: Duplicates = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criteo(Part):
    """Click logs in Criteo's form: label, integers i1..i13, categories c1..c26, apart by tabs, no header."""

    sort: ClassVar[str] = "clicks"

    path: str | tuple[str, ...]
    kind: Literal["criteo"] = "criteo"
    split: Fractions = Fractions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovieLensClicks(Part):
    """MovieLens-100K as clicks: a click is a rating of at least `at_least`.

    Features: user, item, age, gender, occupation, hour, weekday, the film's genre (a bag) and year (a number).
    """

    sort: ClassVar[str] = "clicks"

    kind: Literal["movielens_100k_clicks"] = "movielens_100k_clicks"
    at_least: float = 4.0
    split: Fractions = Fractions(by="user_time")


ClickDataConfig = ClicksFile | Criteo | MovieLensClicks
