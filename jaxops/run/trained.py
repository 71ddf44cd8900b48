"""A trained recommender out of its run folder: predict, export, evaluate. No mesh, no config at hand.

The transform (original ids, id maps, features, statistics) is frozen in the run folder: serving sees what training saw.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from jaxops.config.load import from_dict
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.core.state import Params, join
from jaxops.core.sums import Sums
from jaxops.data.clicks.examples import ExampleBatches
from jaxops.data.ids import Ids
from jaxops.data.interactions.events import ColumnBatches
from jaxops.evaluate.index import Index
from jaxops.families.rec.clicks import ClickModel, restore_clicks
from jaxops.families.rec.config import CLICK_MODELS, SCHEMAS
from jaxops.families.rec.entities import Encoded, query_codes, restore
from jaxops.families.rec.histories import Histories, HistoryBatches, read_histories, same_items
from jaxops.families.rec.retrieval import query_context, two_tower_ranking
from jaxops.families.rec.sasrec_tables import event_context, sasrec_ranking
from jaxops.families.rec.tables_config import features_of
from jaxops.models.two_tower import TwoTowerConfig
from jaxops.run.folder.run_folder import RunFolder
from jaxops.run.passes import ROWS, Passes, Weights
from jaxops.run.task import Ranking
from jaxops.run.validation import Measure


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its parameters (the moving average where the run kept one) and its frozen transform.

    `asks` is what `predict` asks of the model; `tables` hold rows as they are stored, and their average.
    """

    config: Any
    asks: Ranking | ClickModel
    params: Params
    item_ids: Ids
    step: int
    resolved: dict[str, Any]
    tables: dict[str, Any] = dataclasses.field(default_factory=dict)
    user_ids: Ids | None = None
    transform: Callable[[str], np.ndarray] | None = None

    @property
    def model(self) -> Any:
        """The model as training has it, whose methods take `params`."""
        return self.asks.model

    def histories(self, path: str | os.PathLike[str]) -> Histories:
        """Reads what to predict for: events (user, item, time) or, with a user column alone, users of the run's data.

        Items that the model does not know are left out of a history and counted; so are users it has no history of.

        Raises:
          UserError: the file cannot be read, or has no user column.
        """
        return read_histories(path, self.config.data, self.item_ids, self._context("id"), self._context("events"))

    def predict(
        self, source: str | os.PathLike[str] | Histories, k: int = 10, *, batch: int = 512, method: str = "auto"
    ) -> pa.Table:
        """The k best items that each user has not seen: user, rank (from 1), item, score; original ids.

        Of a click model instead the probability of each label, float32, for each row of a file: with the columns that
        say whose it is, in the order of the file.

        Args:
          source: a file as in `histories`, or histories; of a click model, a file with the columns of its data.
          method: of `evaluate.index.Index`.

        Raises:
          UserError: what `histories` raises; k is below one.
        """
        if isinstance(self.asks, ClickModel):
            return self._clicks(self.asks, source, batch)
        if k < 1:
            raise UserError(f"predict: top k must be at least 1, got {k}")
        given = source if isinstance(source, Histories) else self.histories(source)
        users, ranks, items, scores = [], [], [], []
        index = self.index(method)
        for start, vectors, seen in self._vectors(given, batch):
            best, found = jax.device_get(index.search(vectors, k, seen))
            real = min(len(best), len(given.users) - start)
            keep = found[:real] > 0
            row, column = np.nonzero(keep)
            users.append(given.users[start + row])
            ranks.append(column.astype(np.int32) + 1)
            items.append(self.item_ids.originals(found[:real][keep]))
            scores.append(best[:real][keep])
        if not users:
            raise UserError("predict: no user has a history that the model knows")
        table = {"user": users, "rank": ranks, "item": items, "score": scores}
        return pa.table({name: pa.array(np.concatenate(parts)) for name, parts in table.items()})

    def index(self, method: str = "auto") -> Index:
        """The items' vectors, to be searched by those of users; on all devices that are here.

        Raises:
          UserError: an unknown method; the model ranks no items.
        """
        if method not in self._indices:
            self._indices[method] = Index(self._items, self._mesh, real=self._ranking().n_items, method=method)
        return self._indices[method]

    def recall(self, source: str | os.PathLike[str] | Histories, k: int = 10, *, method: str = "auto") -> float:
        """The share of the exact top k that `predict` with this method finds, of the first 512 users.

        Raises:
          UserError: as `predict`.
        """
        given = source if isinstance(source, Histories) else self.histories(source)
        _, vectors, seen = next(self._vectors(given, 512))
        return self.index(method).recall(vectors[: len(given.users)], k, seen[: len(given.users)])

    @property
    def ranks(self) -> bool:
        """Whether it ranks items for users; if not, it predicts clicks of rows."""
        return isinstance(self.asks, Ranking)

    def _clicks(self, model: ClickModel, source: Any, size: int) -> pa.Table:
        if isinstance(source, Histories):
            raise UserError(f"predict: {self.config.model.kind} predicts clicks of rows, not of histories: give a file")
        examples, own = model.rows(source)
        passes = self._passes(size)
        batches = ExampleBatches(examples, np.arange(len(examples.weight)), passes.size)
        with jax.set_mesh(self._mesh):
            parts = [np.asarray(part) for part in passes.over("rows", model.click, self._weights, batches)]
        found = np.concatenate(parts)[: len(examples.weight)]
        clicks = {label: pa.array(found[:, at]) for at, label in enumerate(model.labels)}
        return pa.table({kind: ids for kind, ids in own.who.items() if kind not in clicks} | clicks)

    def _context(self, entry: str) -> list[str]:
        """The columns that a query brings along, by the entry of its batch that tells their rows."""
        return [name for name, found in self._ranking().context.items() if found == entry]

    def _ranking(self) -> Ranking:
        if isinstance(self.asks, ClickModel):
            raise UserError(f"{self.config.model.kind} predicts clicks: it ranks no items and has no item vectors")
        return self.asks

    def item_vectors(self) -> pa.Table:
        """Original item ids and their vectors: item, vector (fixed-size list of float32).

        Raises:
          UserError: the model ranks no items.
        """
        rows = np.arange(1, self._ranking().n_items + 1)
        vectors = np.asarray(self._items, np.float32)[rows]
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        return pa.table({"item": pa.array(self.item_ids.originals(rows)), "vector": flat})

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return make_mesh(data=-1)

    @functools.cached_property
    def _passes_by_size(self) -> dict[int, Passes]:
        return {}

    @functools.cached_property
    def _indices(self) -> dict[str, Index]:
        return {}

    def _passes(self, size: int) -> Passes:
        """For batches of this size; kept, as is every index, for what it has compiled."""
        if size not in self._passes_by_size:
            self._passes_by_size[size] = Passes.of(self.config, self.asks.tables, self._mesh, size)
        return self._passes_by_size[size]

    @functools.cached_property
    def _weights(self) -> Weights:
        """Everything on the mesh, and once: with every batch of users it would take longer than their answers."""
        passes = self._passes(512)
        with jax.set_mesh(self._mesh):
            weights = passes.weights(self.params, self.tables)
            if isinstance(self.asks, ClickModel) or self.asks.catalogue is None:
                return weights
            vectors = passes.catalogue(weights, self.asks.catalogue)
        return Weights({**weights.params, "catalogue": vectors}, weights.tables)

    @functools.cached_property
    def _items(self) -> np.ndarray:
        """Vectors of all items by row, in the dtype that scores are computed in."""
        with jax.set_mesh(self._mesh):
            vectors = self._ranking().items(self._weights.params)
            return np.asarray(vectors.astype(self.config.precision.compute))

    def _vectors(self, given: Histories, size: int) -> Iterator[tuple[int, Any, Any]]:
        """By batches: the first user, the users' vectors and the items they have seen; the last batch padded."""
        ranking = self._ranking()
        passes = self._passes(size)
        users = np.full(len(given.users), -1) if self.user_ids is None else self.user_ids.rows(given.users)
        assert self.transform is not None
        values = {**given.context, **given.along}
        missing = [name for name in ranking.context if name not in values]
        if missing:
            field = "context" if ranking.context[missing[0]] == "id" else "along"
            raise UserError(f"predict: the model reads {missing[0]!r}, which Histories.{field} lacks")
        brought = query_codes(self.config.tables, {name: values[name] for name in ranking.context}, self.transform)
        columns = {**ranking.columns, **{name: (ranking.context[name], codes) for name, codes in brought.items()}}
        batches = ColumnBatches(HistoryBatches(given, users, ranking.length, passes.size), columns)
        asked = lambda params, batch: (ranking.queries(params, batch), batch["seen"])
        with jax.set_mesh(self._mesh):
            found = passes.over("queries", asked, self._weights, batches)
            for at, (vectors, seen) in enumerate(found):
                yield at * passes.size, vectors, seen

    def evaluate(self, parts: tuple[str, ...] = ("valid", "test")) -> dict[str, float]:
        """Metrics on the run's own data, on the devices that are here.

        Raises:
          UserError: the data cannot be opened.
        """
        from jaxops.families.rec.ranking import build_rec

        task = build_rec(self.config, self.resolved, lambda model: _no_objective)
        if "item_ids" in task.transform:
            same_items(self.item_ids, task.transform["item_ids"])
        self._same_rows(task.transform)
        out: dict[str, float] = {}
        with jax.set_mesh(self._mesh):
            measure = Measure(task, self._mesh)
            weights = measure.passes.weights(self.params, self.tables)
            for part in (part for part in parts if part in task.evaluations):
                out |= {f"{part}/{name}": value for name, value in measure(weights, part).values.items()}
        return out

    def _same_rows(self, transform: Mapping[str, np.ndarray]) -> None:
        """Refuses data, opened again, whose values lie in other rows than training gave them.

        Raises:
          UserError: they do.
        """
        assert self.transform is not None
        for name in (name for name in transform if name.startswith(("map.", "table.", "numeric."))):
            if not np.array_equal(_text(transform[name]), _text(self.transform(name))):
                raise UserError(
                    f"the run's data has changed since: {name} of its transform is another now than the model was"
                    " trained with; evaluate on the data as it was, or train again (init_from takes rows over by their"
                    " ids)"
                )


def _text(values: np.ndarray) -> np.ndarray:
    """As it compares with what was written and read again: bytes as text."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8")
    return values.astype(str) if values.dtype.kind == "O" else values


def _no_objective(params: Params, batch: Mapping[str, Any], key: Any) -> Sums:
    raise AssertionError("evaluation needs no objective")


def load(run_dir: str | os.PathLike[str], step: int | None = None) -> Trained:
    """The model of a run: the best checkpoint where the run keeps one, else the latest, or the one of `step`.

    Args:
      run_dir: a run folder, or its s3:// or gs:// URL.

    Raises:
      UserError: not a run folder, no checkpoint, a broken one, or no such step.
    """
    place = RunFolder(run_dir)
    resolved = place.config()
    loaded = from_dict(SCHEMAS, resolved, source=place.shown("config.yaml"), check_imports=False)
    config = loaded.config
    best = f"valid/{config.checkpoint.best}" if config.checkpoint.best else None
    with Checkpoints(place.checkpoints, keep=config.checkpoint.keep, best=best) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{run_dir} has no checkpoint yet")
        if step is not None and step not in steps:
            raise UserError(f"{run_dir} has no checkpoint of step {step} (there are: {', '.join(map(str, steps))})")
        if step is None:
            kept = checkpoints.best() if best else None
            step = kept if kept is not None else checkpoints.latest() or steps[-1]
        damage = [what for what in checkpoints.verify(step) if not what.startswith("no checksums")]
        if damage:
            others = ", ".join(str(other) for other in steps if other != step)
            raise UserError(
                f"{run_dir}: the checkpoint of step {step} is damaged: {'; '.join(damage[:3])}"
                + (f". There are others: --step {others}" if others else "")
            )
        prefix = "extra/ema" if config.optimizer.ema else "params"
        params = checkpoints.load_params(step, prefix)
        frozen = checkpoints.load_params(step, "frozen") if config.optimizer.frozen else {}
        tables = checkpoints.load_params(step, "tables", leaves=ROWS) if config.tables else {}
    whole, read = jax.tree.map(jnp.asarray, join(params, frozen)), place.transform
    items, users = Ids(np.zeros(0, np.int64), first=1), None
    asks: Ranking | ClickModel
    if isinstance(config.model, CLICK_MODELS):
        asks = restore_clicks(config, read)
    else:
        items = Ids.of(read("item_ids"), first=1)
        if isinstance(config.model, TwoTowerConfig):
            users = Ids.of(read("user_ids"), first=0)
            names = (*config.model.user, *config.model.item)
            asks = two_tower_ranking(config, _features(config, names, read), len(items))
        else:
            names = config.model.inputs
            asks = sasrec_ranking(config, len(items), _features(config, names, read) if names else None)
            if any(entry == "users" for entry, _ in asks.columns.values()):
                users = Ids.of(read("user_ids"), first=0)
    return Trained(config, asks, whole, items, step, resolved, tables, users, read)


def _features(config: Any, names: tuple[str, ...], read: Callable[[str], np.ndarray]) -> Encoded:
    owner = features_of(config.tables)
    sides = (getattr(config.data, "user_features", None), getattr(config.data, "item_features", None))
    weighted = {name for file in sides if file is not None for name in file.weights}
    asked = (query_context if isinstance(config.model, TwoTowerConfig) else event_context)(config)
    return restore(config.tables, {name: owner[name] for name in names}, weighted, read, asked)
