"""Passes of a trained model over batches on a mesh, with table lookups: for evaluation and for serving."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxops.core.evaluation import on_batches
from jaxops.core.mesh import batch_sharding, batch_shards, serialise_dispatch
from jaxops.core.rows import local_batches
from jaxops.core.sharding import Axes
from jaxops.core.state import Params
from jaxops.run.weights import Weights
from jaxops.tables.average import AVERAGE
from jaxops.tables.spec import TableSpec, stack
from jaxops.tables.tables import EmbeddingTables, evaluated, reading, sharding

Batches = Iterable[Mapping[str, Any]]


class Passes:
    """Runs functions of (params, batch) over batches, one after another, inside `jax.set_mesh(mesh)`.

    Batches of one kind have the same entries, and a kind's function is compiled once.

    Args:
      specs: the embedding tables by name.
      mesh: the mesh to run on.
      size: rows of a batch over all devices; it is rounded up to a multiple of the mesh's batch shards.
      dtype: the dtype of the computation.
      logical: mesh axes by logical name.
    """

    def __init__(self, specs: Mapping[str, TableSpec], mesh: Mesh, size: int, dtype: Any, logical: Mapping[str, Axes]):
        shards = batch_shards(mesh)
        self.mesh, self.size, self.dtype, self.logical = mesh, -(-size // shards) * shards, jnp.dtype(dtype), logical
        self._specs = stack(specs)
        self._readers: dict[str, EmbeddingTables] = {}
        self._compiled: dict[str, Callable[..., Any]] = {}

    @staticmethod
    def of(config: Any, specs: Mapping[str, TableSpec], mesh: Mesh, size: int) -> "Passes":
        """Returns passes with the compute dtype and the logical axes of a config.

        Args:
          config: the run's config.
          specs: the embedding tables by name.
          mesh: the mesh to run on.
          size: rows of a batch over all devices.
        """
        return Passes(specs, mesh, size, config.precision.compute, config.sharding.logical)

    def weights(self, params: Params, tables: Mapping[str, Mapping[str, Any]]) -> Weights:
        """Places parameters and table rows from the host on the mesh."""
        everywhere = jax.sharding.NamedSharding(self.mesh, P())
        lies = {name: sharding(spec, self.mesh) for name, spec in self._specs.items()}
        rows = {
            name: {slot: jax.device_put(x, everywhere if x.ndim == 0 else lies[name]) for slot, x in table.items()}
            for name, table in tables.items()
        }
        return self.with_averaged_rows(Weights(jax.device_put(params, everywhere), rows))

    def with_averaged_rows(self, weights: Weights) -> Weights:
        """Returns the weights with averaged rows in place of trained ones, for tables that keep a moving average."""
        averaged = any(AVERAGE in table for table in weights.tables.values())
        if not averaged or not any(spec.ema for spec in self._specs.values()):
            return weights
        if "averaged rows" not in self._compiled:
            rows = lambda tables: {name: {"rows": evaluated(self._specs[name], x)} for name, x in tables.items()}
            self._compiled["averaged rows"] = jax.jit(rows)
        found = self._compiled["averaged rows"](weights.tables)
        return Weights(weights.params, jax.block_until_ready(found) if serialise_dispatch(self.mesh) else found)

    def planned(self, kind: str, batches: Batches) -> tuple[Iterator[Mapping[str, Any]], EmbeddingTables | None]:
        """Returns the batches with lookup plans, and the tables that read them. Plans of one kind have equal shapes."""
        if not self._specs:
            return local_batches(batches, self.mesh, self.size), None
        if kind not in self._readers:
            self._readers[kind] = reading(self._specs, self.mesh, next(iter(batches)))
        reader = self._readers[kind]
        return local_batches(batches, self.mesh, self.size, reader.plan), reader

    def over(
        self, kind: str, function: Callable[[Params, Any], Any], weights: Weights, batches: Batches
    ) -> Iterator[Any]:
        """Yields the function's result for each batch, replicated on every device.

        Args:
          kind: names the function and its batches; each kind is compiled once.
          function: (params, batch) -> arrays.
          weights: the weights, placed on the mesh.
          batches: batches of `size` rows.
        """
        planned, reader = self.planned(kind, batches)
        if kind not in self._compiled:
            run = on_batches(function, self.mesh, P(), self.dtype, self.logical, reader)
            self._compiled[kind] = jax.jit(run, in_shardings=(None, None, batch_sharding(self.mesh)))
        for batch in planned:
            found = self._compiled[kind](weights.params, weights.tables, batch)
            yield jax.block_until_ready(found) if serialise_dispatch(self.mesh) else found
