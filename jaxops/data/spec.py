"""The parts that the configs of all sorts of data share: formats, times, text, side files."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field

from jaxops.core.failures import UserError

Format = Literal["auto", "csv", "tsv", "jsonl", "parquet"]
TimeUnit = Literal["s", "ms", "us", "ns", "date"]
"""The unit of times that are numbers since 1970; `date` is 20150401."""
Duplicates = Literal["auto", "drop", "keep"]
"""The treatment of exact copies of events or examples, which are equal in every column that is read.

`auto` drops and counts them where times are finer than a day. Where times are dates alone it keeps and counts them
(honest repeats look the same), and a held-out target that has a copy in its history is left out. `drop` drops them all
and `keep` keeps them all.
"""
Moment = str | int | float
"""An ISO date or time (UTC unless it says otherwise) or unix seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFormat:
    """The way CSV and TSV files are written; `auto` looks at the beginning of each file and says what it found.

    `separator` is a comma, a tab, `;`, `|`, `::` or anything else. `quote`: fields may stand in double quotes, or
    quotes are letters (`auto`: letters in TSV). `encoding` is a name that Python knows.
    """

    separator: Annotated[str, Field(min_length=1)] = "auto"
    quote: Literal["auto", "double", "none"] = "auto"
    encoding: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideFile:
    """Columns of users or items from a file of their own, joined by `key`; `bags` are text apart by `separator`.

    `weights` names, by bag, the column of the weights of its values: as many numbers, written in the same way.
    `numeric` columns are for click models, which read numbers.
    """

    path: str | tuple[str, ...]
    key: str
    columns: tuple[str, ...] = ()
    bags: tuple[str, ...] = ()
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    numeric: tuple[str, ...] = ()
    separator: Annotated[str, Field(min_length=1)] = "|"
    format: Format = "auto"
    header: tuple[str, ...] | None = None
    text: TextFormat = TextFormat()


def name_owners(
    named: Sequence[tuple[str, Iterable[str]]],
    reserved: Collection[str],
    owner: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Returns, for each feature, the path of the config that names it: an entry of a batch has one owner.

    Args:
      named: pairs of a path of the config and the features that it names.
      reserved: names of other entries of batches, which no feature may have.
      owner: features that have an owner already.

    Raises:
      UserError: a name is reserved or has an owner already.
    """
    out = dict(owner)
    for path, names in named:
        for name in names:
            if name in reserved:
                raise UserError(
                    f"{path}: a feature cannot be called {name!r}, as another entry of batches is; rename the column"
                )
            if name in out:
                raise UserError(f"{path}: {name!r} is named by {out[name]} already; one of them must be renamed")
            out[name] = path
    return out
