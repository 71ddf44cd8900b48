"""The `tables:` section: how a user writes down an embedding table, and the spec that it becomes."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from jaxops.core.failures import UserError, nearest
from jaxops.data.idmaps import Hashed, IdMap, Range, Vocabulary
from jaxops.tables.optimizers import RowwiseAdagrad, TableOptimizer
from jaxops.tables.spec import Init, Placement, TableSpec

Positive = Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """An embedding table for the features named (default: the one of the table's own name); row 0 is for unknown ids.

    `rows: auto` is as many as the vocabulary needs; hashing and ranges must be told. `ema` is the decay of a moving
    average of the rows, which is evaluated and served, as `optimizer.ema` is of the parameters. Rows begin as draws of
    `init`: a normal with standard deviation `scale`, or uniform between -scale and scale. `pool`: what becomes of the
    rows of a bag.
    """

    dim: Positive
    rows: Positive | Literal["auto"] = "auto"
    features: tuple[str, ...] = ()
    ids: IdMap = Vocabulary()
    dtype: Literal["float32", "bfloat16"] = "float32"
    init: Init = "normal"
    scale: Annotated[float, Field(ge=0)] = 0.01
    optimizer: TableOptimizer = RowwiseAdagrad()
    pool: Literal["mean", "sum"] = "mean"
    placement: Placement = "auto"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    capacity: Positive | None = None

    def problems(self) -> list[tuple[str, str]]:
        """What no other section could make right (dotted path, message)."""
        found = [(f"optimizer.{name}", what) for name, what in self.optimizer.problems()]
        if isinstance(self.ids, Hashed | Range) and self.rows == "auto":
            found.append(("rows", f"ids: {self.ids.kind} needs a number of rows"))
        if self.rows != "auto" and self.rows < 2:
            found.append(("rows", "expected 2 or more: row 0 is for unknown ids"))
        if self.rows != "auto" and self.rows > 2**31 - 2048:
            found.append(("rows", f"{self.rows:,} do not fit 32-bit row numbers; divide the ids over several tables"))
        return found

    def spec(self, rows: int, features: tuple[str, ...]) -> TableSpec:
        """The table as it is built, once its rows are counted."""
        return TableSpec(
            rows=rows,
            dim=self.dim,
            features=features,
            dtype=self.dtype,
            init=self.init,
            scale=self.scale,
            optimizer=self.optimizer,
            placement=self.placement,
            ema=self.ema,
            capacity=self.capacity,
        )


def features_of(tables: Mapping[str, TableConfig]) -> dict[str, str]:
    """The table of each feature.

    Raises:
      UserError: a feature is read from two tables.
    """
    owner: dict[str, str] = {}
    for name, table in tables.items():
        for feature in table.features or (name,):
            if owner.setdefault(feature, name) != name:
                raise UserError(f"tables.{name}.features: {feature!r} is read from tables.{owner[feature]} already")
    return owner


def match(tables: Mapping[str, TableConfig], wanted: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """The table of each wanted feature: all have one, and no table is left over.

    Args:
      wanted: the features that the model reads, with the path of the config that says so.
      known: the features that the data has, with what they are.

    Raises:
      UserError: a feature that the data lacks or that has no table; a table that nobody reads.
    """
    owner = features_of(tables)
    for feature, path in wanted.items():
        if feature not in known:
            raise UserError(f"{path}: the data has no {feature!r}{nearest(feature, known)} (it has {', '.join(known)})")
        if feature not in owner:
            raise UserError(f"{path}: {feature!r} has no table; add `tables: {{{feature}: {{dim: ...}}}}`")
    for feature, name in owner.items():
        if feature not in wanted:
            raise UserError(
                f"tables.{name}: nothing reads {feature!r}{nearest(feature, wanted)}"
                f" (the model reads {', '.join(wanted) or 'no table'})"
            )
    return {feature: owner[feature] for feature in wanted}
