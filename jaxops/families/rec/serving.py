"""A trained ranker of a run folder: it gives the best items for users, item vectors, and metrics on the run's own data.

The transform (original ids, id maps, features, statistics) is frozen in the run folder, so that serving sees the same
inputs as training.
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
from jaxops.families.rec.other_data import evaluate_other_data
from jaxops.families.rec.ranking import Ranking, with_catalogue
from jaxops.run.given_table import as_file
from jaxops.run.load import evaluate_saved
from jaxops.run.outputs import counted, write_table
from jaxops.run.passes import Passes
from jaxops.run.saved_run import SavedRun
from jaxops.run.weights import Weights
from jaxops.tables.spec import TableSpec

TOP = 10
"""The default number of items for each user."""


class ServedRanking:
    """A trained ranker with its frozen transform.

    Attributes:
      saved: the run that trained it.
      ranking: the model in the form that serving uses.
      item_ids: the original ids of items by row.
      user_ids: the original ids of users by row, for a model that reads them.
    """

    def __init__(self, saved: SavedRun, ranking: Ranking, item_ids: Ids, user_ids: Ids | None = None):
        self.saved, self.ranking, self.item_ids, self.user_ids = saved, ranking, item_ids, user_ids
        saved.expect(ranking.model.shapes, ranking.tables)
        self._passes_by_size: dict[int, Passes] = {}
        self._indices: dict[tuple[str, bool], Index] = {}

    @property
    def model(self) -> Any:
        """The model as in training; its methods take `params`."""
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
        """Reads histories: events (user, item, time) or, with a user column alone, users of the run's data.

        Items that the model does not know, and users without a known item, are left out and counted.

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
        """Returns the best items for each user, in columns user, rank (from 1), item and score, with original ids.

        What a user has seen is left out unless the run's `repeats` allows it, and so are items that training never saw
        where their vectors are random (`untrained_items`).

        Args:
          source: a file as in `histories`, a pyarrow table, a data frame, or histories.
          options: the number of items and their search; an integer is the number of items.
          say: it is called with each line that a person should read: users left out, and the recall of an approximate
            search.
          batch: users of a batch.
          keywords: the fields of `Predict`, where `options` is left out.

        Raises:
          UserError: the source does not fit (see `histories`), or `top` is below one.
        """
        wanted = Predict(top=options, **keywords) if isinstance(options, int) else options or Predict(**keywords)
        top, method = TOP if wanted.top is None else wanted.top, wanted.index or "auto"
        if top < 1:
            raise UserError(f"predict: top must be at least 1 item, got {top}")
        given = source if isinstance(source, Histories) else self.histories(source)
        users, ranks, items, scores = [], [], [], []
        allow = (wanted.untrained_items or self.config.untrained_items) == "allow"
        index, short = self.index(method, untrained=allow), 0
        for start, vectors, seen in self._vectors(given, batch):
            best, found = jax.device_get(index.search(vectors, top, seen))
            real = min(len(best), len(given.users) - start)
            keep = found[:real] > 0
            short += int((~keep.all(axis=1)).sum())
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
        if short:
            said = f"{counted(short, 'user')} with fewer than {counted(top, 'item')}: no more are left to recommend"
            excluded = " that they have not had (repeats: exclude)" if self.config.repeats == "exclude" else ""
            say(said + excluded)
        trained = self.ranking.trained
        left_out = 0 if trained is None or allow else int((~trained[1:]).sum())
        if left_out:
            say(
                f"{counted(left_out, 'item')} of {self.ranking.n_items:,} left out: training never saw them"
                " (--untrained-items allow recommends them by their random rows)"
            )
        if index.method != "exact":
            recall = self.recall(given, top, method=method, untrained=allow)
            say(f"recall@{top} against the exact search, of the first 512 users: {recall:.4f}")
        columns = {"user": users, "rank": ranks, "item": items, "score": scores}
        return pa.table({name: pa.array(np.concatenate(parts)) for name, parts in columns.items()})

    def index(self, method: str = "auto", *, untrained: bool = False) -> Index:
        """Returns an index of the items' vectors over all devices of this machine, which users' vectors search.

        Items that training never saw may be left out of it (`untrained_items`); with `untrained` they are in it.

        Raises:
          UserError: the method is unknown.
        """
        if (method, untrained) not in self._indices:
            trained, rows = self.ranking.trained, np.arange(len(self._items))
            real = (rows >= 1) & (rows <= self.ranking.n_items)
            if trained is not None and not untrained:
                real[: len(trained)] &= trained
            self._indices[method, untrained] = Index(self._items, self.saved.mesh, real=real, method=method)
        return self._indices[method, untrained]

    def recall(self, source: Any, top: int = TOP, *, method: str = "auto", untrained: bool = False) -> float:
        """Returns the share of the exact best items of the first 512 users that a search with this method finds.

        Args:
          source: a file, table or data frame of users, as `predict` takes it, or their histories.
          top: the number of best items.
          method: `exact`, `approx`, or `auto`.
          untrained: search also items that training never saw.

        Raises:
          UserError: the source does not fit, or `top` is below one.
        """
        given = source if isinstance(source, Histories) else self.histories(source)
        if not len(given.users):
            raise UserError("predict: no user has a history that the model knows")
        _, vectors, seen = next(self._vectors(given, 512))
        return self.index(method, untrained=untrained).recall(
            vectors[: len(given.users)], top, seen[: len(given.users)]
        )

    def item_vectors(self) -> pa.Table:
        """Returns the original item ids and their vectors: columns item, vector (fixed-size list of float32)."""
        rows = np.arange(1, self.ranking.n_items + 1)
        vectors = np.asarray(self._items, np.float32)[rows]
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        return pa.table({"item": pa.array(self.item_ids.originals(rows)), "vector": flat})

    def export(self, path: Path, options: Export | None = None, **keywords: Any) -> str:
        """Writes the item vectors to a Parquet file (or into a folder); returns one line for people.

        Raises:
          UserError: the path cannot be written.
        """
        del options, keywords
        return write_table(path, self.item_vectors, "item vector")

    def evaluate(
        self,
        parts: tuple[str, ...] = ("valid", "test"),
        *,
        other_data: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> dict[str, float]:
        """Metrics on the run's own data, on the devices that are here.

        Args:
          parts: which of them.
          other_data: on what lies there now, whether or not it is the run's data, without what training saw of it.
          say: gets what a person should know of other data.

        Raises:
          UserError: the data cannot be opened, or have changed.
        """
        if other_data:
            return evaluate_other_data(self, parts, say)

        def check(task: Any) -> None:
            if "item_ids" in task.transform:
                same_items(self.item_ids, task.transform["item_ids"])
            same_transform(self.saved, task.transform)

        return evaluate_saved(self.saved, parts, check)

    def _context(self, entry: str) -> list[str]:
        """Returns the context columns that come with a query and are looked up by this batch entry."""
        return [name for name, found in self.ranking.context.items() if found == entry]

    def _passes(self, size: int) -> Passes:
        """Returns passes over batches of this size. They are kept, since they hold compiled functions."""
        if size not in self._passes_by_size:
            self._passes_by_size[size] = self.saved.passes(self.ranking.tables, size)
        return self._passes_by_size[size]

    @functools.cached_property
    def _weights(self) -> Weights:
        """The weights on the mesh. They are placed once, since placing them takes longer than one batch of users."""
        passes, catalogue = self._passes(512), self.ranking.catalogue
        weights = self.saved.placed(passes)
        if catalogue is None:
            return weights
        with jax.set_mesh(self.saved.mesh):
            return with_catalogue(catalogue, passes, weights)

    @functools.cached_property
    def _items(self) -> np.ndarray:
        """The vectors of all items by row, in the dtype of the computation."""
        with jax.set_mesh(self.saved.mesh):
            vectors = self.ranking.items(self._weights.params)
            return np.asarray(vectors.astype(self.config.precision.compute))

    def batches(self, given: Histories, size: int) -> ColumnBatches:
        """Batches of these histories, as the model reads them.

        Raises:
          UserError: the model reads a column that the histories do not bring.
        """
        ranking = self.ranking
        users = np.full(len(given.users), -1) if self.user_ids is None else self.user_ids.rows(given.users)
        values = {**given.context, **given.along}
        missing = [name for name in ranking.context if name not in values]
        if missing:
            field = "context" if ranking.context[missing[0]] == "id" else "along"
            raise UserError(f"predict: the model reads {missing[0]!r}, which Histories.{field} lacks")
        asked = {name: values[name] for name in ranking.context}
        brought = query_codes(self.config.tables, asked, self.saved.transform)
        columns = {**ranking.columns, **{name: (ranking.context[name], codes) for name, codes in brought.items()}}
        return ColumnBatches(HistoryBatches(given, users, ranking.length, size), columns)

    def _vectors(self, given: Histories, size: int) -> Iterator[tuple[int, Any, Any]]:
        """Yields for each batch its first user, the users' vectors and the items they have seen; the last is padded."""
        ranking, passes = self.ranking, self._passes(size)
        batches = self.batches(given, passes.size)
        allow = self.config.repeats == "allow"  # then nothing is left out: a column of 0, which is no item
        answer = lambda params, batch: (
            ranking.queries(params, batch),
            batch["seen"][:, :1] * 0 if allow else batch["seen"],
        )
        with jax.set_mesh(self.saved.mesh):
            found = passes.over("queries", answer, self._weights, batches)
            for at, (vectors, seen) in enumerate(found):
                yield at * passes.size, vectors, seen


def same_transform(saved: SavedRun, transform: Mapping[str, np.ndarray]) -> None:
    """Checks that data that was opened again has its values in the same rows as in training.

    Raises:
      UserError: the transform differs.
    """
    for name in (name for name in transform if name.startswith(("map.", "table.", "numeric."))):
        if not np.array_equal(_text(transform[name]), _text(saved.transform(name))):
            raise UserError(
                f"the run's data has changed since: {name} of its transform is another now than the model was"
                " trained with; evaluate on the data as it was, or train again (init_from takes rows over by their"
                " ids)"
            )


def _text(values: np.ndarray) -> np.ndarray:
    """Converts bytes and objects to text, so that values compare with values that were written and read again."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8")
    return values.astype(str) if values.dtype.kind == "O" else values
