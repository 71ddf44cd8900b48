"""A trained ranker out of its run folder: the best items for users, item vectors, metrics on the run's own data.

The transform (original ids, id maps, features, statistics) is frozen in the run folder: serving sees what training saw.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from jaxops.core.failures import UserError
from jaxops.core.state import Params
from jaxops.data.ids import Ids
from jaxops.data.interactions.events import ColumnBatches
from jaxops.evaluate.index import Index
from jaxops.families.rec.entities import query_codes
from jaxops.families.rec.histories import Histories, HistoryBatches, read_histories, same_items
from jaxops.families.rec.options import Export, Predict
from jaxops.families.rec.ranking import Ranking, with_catalogue
from jaxops.run.given_table import as_file
from jaxops.run.load import evaluate_saved
from jaxops.run.outputs import counted, write_table
from jaxops.run.passes import Passes
from jaxops.run.saved_run import SavedRun
from jaxops.run.weights import Weights
from jaxops.tables.spec import TableSpec

TOP = 10
"""Items a user, where nothing else is asked for."""


class ServedRanking:
    """A trained ranker with its frozen transform.

    Attributes:
      saved: the run that it is of.
      ranking: the model as it is asked.
      item_ids: the original ids of items by row; `user_ids` those of users, of a model that reads them.
    """

    def __init__(self, saved: SavedRun, ranking: Ranking, item_ids: Ids, user_ids: Ids | None = None):
        self.saved, self.ranking, self.item_ids, self.user_ids = saved, ranking, item_ids, user_ids
        self._passes_by_size: dict[int, Passes] = {}
        self._indices: dict[str, Index] = {}

    @property
    def model(self) -> Any:
        """The model as training has it, whose methods take `params`."""
        return self.ranking.model

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """The specs of the tables that the model reads."""
        return self.ranking.tables

    @property
    def config(self) -> Any:
        """The run's frozen config."""
        return self.saved.config

    @property
    def params(self) -> Params:
        """The parameters that are served, as numpy arrays."""
        return self.saved.weights.params

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self.saved.step

    def histories(self, source: Any) -> Histories:
        """Reads whom to predict for: events (user, item, time) or, with a user column alone, users of the run's data.

        Items that the model does not know are left out of a history and counted; so are users it has no history of.

        Raises:
          UserError: the source cannot be read, or has no user column.
        """
        with as_file(source) as path:
            return read_histories(path, self.config.data, self.item_ids, self._context("id"), self._context("events"))

    def predict(
        self,
        source: Any,
        options: Predict | int | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        batch: int = 512,
        **keywords: Any,
    ) -> pa.Table:
        """The best items that each user has not seen: user, rank (from 1), item, score; original ids.

        Args:
          source: a file as in `histories`, a pyarrow table, a data frame, or histories.
          options: how many items, and how they are searched; a number alone is how many.
          say: gets what a person should know: who was left out, and the recall of an approximate search.
          batch: users at a time.
          keywords: the fields of `Predict`, where `options` is left out.

        Raises:
          UserError: what `histories` raises; `top` is below one.
        """
        wanted = Predict(top=options) if isinstance(options, int) else options or Predict(**keywords)
        top, method = TOP if wanted.top is None else wanted.top, wanted.index or "auto"
        if top < 1:
            raise UserError(f"predict: top must be at least 1 item, got {top}")
        given = source if isinstance(source, Histories) else self.histories(source)
        users, ranks, items, scores = [], [], [], []
        index = self.index(method)
        for start, vectors, seen in self._vectors(given, batch):
            best, found = jax.device_get(index.search(vectors, top, seen))
            real = min(len(best), len(given.users) - start)
            keep = found[:real] > 0
            row, column = np.nonzero(keep)
            users.append(given.users[start + row])
            ranks.append(column.astype(np.int32) + 1)
            items.append(self.item_ids.originals(found[:real][keep]))
            scores.append(best[:real][keep])
        if not users:
            raise UserError("predict: no user has a history that the model knows")
        say(f"{counted(len(given.users), 'user')} asked for")
        if given.unknown_users:
            say(f"{counted(given.unknown_users, 'user')} left out: the model knows nothing of what they did")
        if given.unknown_items:
            say(f"{counted(given.unknown_items, 'event')} left out: items that the model does not know")
        if index.method != "exact":
            recall = self.recall(given, top, method=method)
            say(f"recall@{top} against the exact search, of the first 512 users: {recall:.4f}")
        columns = {"user": users, "rank": ranks, "item": items, "score": scores}
        return pa.table({name: pa.array(np.concatenate(parts)) for name, parts in columns.items()})

    def index(self, method: str = "auto") -> Index:
        """The items' vectors, to be searched by those of users; on all devices that are here.

        Raises:
          UserError: an unknown method.
        """
        if method not in self._indices:
            self._indices[method] = Index(self._items, self.saved.mesh, real=self.ranking.n_items, method=method)
        return self._indices[method]

    def recall(self, source: Any, top: int = TOP, *, method: str = "auto") -> float:
        """The share of the exact best items that `predict` with this method finds, of the first 512 users.

        Raises:
          UserError: as `predict`.
        """
        given = source if isinstance(source, Histories) else self.histories(source)
        _, vectors, seen = next(self._vectors(given, 512))
        return self.index(method).recall(vectors[: len(given.users)], top, seen[: len(given.users)])

    def item_vectors(self) -> pa.Table:
        """Original item ids and their vectors: item, vector (fixed-size list of float32)."""
        rows = np.arange(1, self.ranking.n_items + 1)
        vectors = np.asarray(self._items, np.float32)[rows]
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        return pa.table({"item": pa.array(self.item_ids.originals(rows)), "vector": flat})

    def export(self, path: Path, options: Export | None = None, **keywords: Any) -> str:
        """Writes the item vectors to a Parquet file (or into a folder); what was written, for people.

        Raises:
          UserError: the path cannot be written.
        """
        del options, keywords
        return write_table(path, self.item_vectors, "item vector")

    def evaluate(self, parts: tuple[str, ...] = ("valid", "test")) -> dict[str, float]:
        """Metrics on the run's own data, on the devices that are here.

        Raises:
          UserError: the data cannot be opened, or have changed.
        """

        def check(task: Any) -> None:
            if "item_ids" in task.transform:
                same_items(self.item_ids, task.transform["item_ids"])
            same_transform(self.saved, task.transform)

        return evaluate_saved(self.saved, parts, check)

    def _context(self, entry: str) -> list[str]:
        """The columns that a query brings along, by the entry of its batch that tells their rows."""
        return [name for name, found in self.ranking.context.items() if found == entry]

    def _passes(self, size: int) -> Passes:
        """Passes over batches of this size; kept, as is every index, for what it has compiled."""
        if size not in self._passes_by_size:
            self._passes_by_size[size] = self.saved.passes(self.ranking.tables, size)
        return self._passes_by_size[size]

    @functools.cached_property
    def _weights(self) -> Weights:
        """Everything on the mesh, and once: with every batch of users it would take longer than their answers."""
        passes, catalogue = self._passes(512), self.ranking.catalogue
        weights = self.saved.placed(passes)
        if catalogue is None:
            return weights
        with jax.set_mesh(self.saved.mesh):
            return with_catalogue(catalogue, passes, weights)

    @functools.cached_property
    def _items(self) -> np.ndarray:
        """Vectors of all items by row, in the dtype that scores are computed in."""
        with jax.set_mesh(self.saved.mesh):
            vectors = self.ranking.items(self._weights.params)
            return np.asarray(vectors.astype(self.config.precision.compute))

    def _vectors(self, given: Histories, size: int) -> Iterator[tuple[int, Any, Any]]:
        """By batches: the first user, the users' vectors and the items they have seen; the last batch padded."""
        ranking, passes = self.ranking, self._passes(size)
        users = np.full(len(given.users), -1) if self.user_ids is None else self.user_ids.rows(given.users)
        values = {**given.context, **given.along}
        missing = [name for name in ranking.context if name not in values]
        if missing:
            field = "context" if ranking.context[missing[0]] == "id" else "along"
            raise UserError(f"predict: the model reads {missing[0]!r}, which Histories.{field} lacks")
        asked = {name: values[name] for name in ranking.context}
        brought = query_codes(self.config.tables, asked, self.saved.transform)
        columns = {**ranking.columns, **{name: (ranking.context[name], codes) for name, codes in brought.items()}}
        batches = ColumnBatches(HistoryBatches(given, users, ranking.length, passes.size), columns)
        answer = lambda params, batch: (ranking.queries(params, batch), batch["seen"])
        with jax.set_mesh(self.saved.mesh):
            found = passes.over("queries", answer, self._weights, batches)
            for at, (vectors, seen) in enumerate(found):
                yield at * passes.size, vectors, seen


def same_transform(saved: SavedRun, transform: Mapping[str, np.ndarray]) -> None:
    """Refuses data, opened again, whose values lie in other rows than training gave them.

    Raises:
      UserError: they do.
    """
    for name in (name for name in transform if name.startswith(("map.", "table.", "numeric."))):
        if not np.array_equal(_text(transform[name]), _text(saved.transform(name))):
            raise UserError(
                f"the run's data has changed since: {name} of its transform is another now than the model was"
                " trained with; evaluate on the data as it was, or train again (init_from takes rows over by their"
                " ids)"
            )


def _text(values: np.ndarray) -> np.ndarray:
    """The values as they compare with what was written and read again: bytes as text."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8")
    return values.astype(str) if values.dtype.kind == "O" else values
