"""The config of interactions: frozen dataclasses and nothing else (`open.py` opens them)."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jaxops.config.part import Part
from jaxops.data.spec import Duplicates, Format, Moment, SideFile, TextFormat, TimeUnit


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the columns. `time: null` keeps the order of the rows; without `weight` every event counts 1.

    Numbers in the time column are unix times in `time_unit`, or dates as 20150401 where that is `date`. Strings are ISO
    8601, UTC unless they say otherwise. `context` columns hold the circumstances of an event (device, hour, shelf).
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
    """Events before `valid_from` train; a user's first event from there validates, the first from `test_from` tests."""

    valid_from: Moment
    test_from: Moment
    kind: Literal["global_time"] = "global_time"


SplitConfig = LeaveOneOut | GlobalTime


@dataclasses.dataclass(frozen=True)
class MovieLens100K(Part):
    """MovieLens-100K, fetched by `jaxops data get movielens_100k` or at first use."""

    sort: ClassVar[str] = "interactions"

    kind: Literal["movielens_100k"] = "movielens_100k"
    min_count: MinCount = MinCount()
    split: SplitConfig = LeaveOneOut()


@dataclasses.dataclass(frozen=True)
class InteractionsFile(Part):
    """One's own events: files, globs, folders (hive partitions too) of CSV, TSV, JSONL or Parquet.

    `header` names the columns of text files that have no header line, and `text` says how these are written. `cache` is
    a folder for the memory-mapped copy that is built once and rebuilt when the inputs change; without it the events are
    read into memory. `duplicates` is the treatment of exact copies of events.
    """

    sort: ClassVar[str] = "interactions"

    path: str | tuple[str, ...]
    kind: Literal["interactions"] = "interactions"
    columns: Columns = Columns()
    min_count: MinCount = MinCount()
    split: SplitConfig = LeaveOneOut()
    cache: str | None = None
    format: Format = "auto"
    header: tuple[str, ...] | None = None
    text: TextFormat = TextFormat()
    duplicates: Duplicates = "auto"
    user_features: SideFile | None = None
    item_features: SideFile | None = None


@dataclasses.dataclass(frozen=True)
class SequencesFile(Part):
    """A text file with one user a line, `user item item ...` in time order."""

    sort: ClassVar[str] = "interactions"

    path: str
    kind: Literal["sequences"] = "sequences"
    split: SplitConfig = LeaveOneOut()


InteractionsConfig = MovieLens100K | InteractionsFile | SequencesFile
