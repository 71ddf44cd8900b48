"""The `tables:` section of a config: an embedding table as a user writes it, and the spec that it becomes."""

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
    """An embedding table; row 0 is for unknown ids.

    Attributes:
      dim: the width of a row.
      rows: the number of rows. `auto` takes as many as the vocabulary needs; hashed ids and ranges need a number.
      features: the features that read the table (default: the one with the table's own name).
      ids: the map from ids to rows.
      dtype: the dtype of the rows.
      init: the distribution of fresh rows: normal with standard deviation `scale`, or uniform in [-scale, scale].
      scale: the scale of fresh rows.
      optimizer: the sparse optimizer of the rows.
      pool: how the rows of a bag are combined.
      placement: how the table is placed on the mesh.
      ema: the decay of a moving average of the rows, which is evaluated and served (like `optimizer.ema`).
      capacity: rows that a device requests from another in one exchange (default: measured on a first batch).
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
        """Returns (dotted path, message) of everything that is wrong whatever the other sections say."""
        found = [(f"optimizer.{name}", what) for name, what in self.optimizer.problems()]
        if isinstance(self.ids, Hashed | Range) and self.rows == "auto":
            found.append(("rows", f"ids: {self.ids.kind} needs a number of rows"))
        if self.rows != "auto" and self.rows < 2:
            found.append(("rows", "expected 2 or more: row 0 is for unknown ids"))
        if self.rows != "auto" and self.rows > 2**31 - 2048:
            found.append(("rows", f"{self.rows:,} do not fit 32-bit row numbers; divide the ids over several tables"))
        return found

    def spec(self, rows: int, features: tuple[str, ...]) -> TableSpec:
        """Returns the spec of the table, once its rows are counted."""
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
    """Returns the table of each feature.

    Raises:
      UserError: two tables name one feature.
    """
    owner: dict[str, str] = {}
    for name, table in tables.items():
        for feature in table.features or (name,):
            if owner.setdefault(feature, name) != name:
                raise UserError(f"tables.{name}.features: {feature!r} is read from tables.{owner[feature]} already")
    return owner


def match(tables: Mapping[str, TableConfig], wanted: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """Returns the table of each wanted feature, and checks that every feature has one and that every table is read.

    Args:
      tables: the config's tables.
      wanted: the features that the model reads, with the path in the config that names them.
      known: the features that the data has, with a word for each.

    Raises:
      UserError: the data lacks a feature, a feature has no table, or nothing reads a table.
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
