"""A trained recommender out of its run folder: predict, export, evaluate. No mesh, no config at hand.

The transform (original item ids) is frozen in the run folder, so what serving sees is what training saw.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64

from jaxops.config.load import from_dict
from jaxops.config.types import ByPath
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import UserError, nearest
from jaxops.core.mesh import make_mesh
from jaxops.core.state import Params, join
from jaxops.core.sums import Sums
from jaxops.data.config import open_data
from jaxops.data.ids import Ids
from jaxops.data.interactions import read_interactions
from jaxops.data.spec import Columns, InteractionsFile
from jaxops.evaluate.ranking import top_k_unseen
from jaxops.models.sasrec import SASRec, SASRecConfig
from jaxops.tasks.config import CLICK_MODELS, SCHEMAS
from jaxops.tasks.run_folder import RunFolder
from jaxops.tasks.training import tables_on
from jaxops.tasks.validation import Measure, Weights


@dataclasses.dataclass(frozen=True)
class Histories:
    """Whose next items are asked for: original user ids and their item rows, oldest first, as CSR.

    `unknown_users` have no event that the model knows and are left out, `unknown_items` counts events left out.
    """

    users: np.ndarray
    items: Int32[np.ndarray, " events"]
    offsets: Int64[np.ndarray, " users_and_one"]
    unknown_users: int = 0
    unknown_items: int = 0


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its parameters (the moving average where the run kept one) and its frozen transform.

    `model` is that of a SASRec, which `predict` and `item_vectors` ask; `tables` hold rows as they are stored.
    """

    config: Any
    model: Any
    params: Params
    item_ids: Ids
    step: int
    resolved: dict[str, Any]
    tables: dict[str, Any] = dataclasses.field(default_factory=dict)

    def histories(self, path: str | os.PathLike[str]) -> Histories:
        """Reads what to predict for: events (user, item, time) or, with a user column alone, users of the run's data.

        Items that the model does not know are left out of a history and counted; so are users it has no history of.

        Raises:
          UserError: the file cannot be read, or has no user column.
        """
        columns = self.config.data.columns if isinstance(self.config.data, InteractionsFile) else Columns()
        names = _column_names(path)
        if columns.user not in names:
            raise UserError(
                f"{path}: no column {columns.user!r}{nearest(columns.user, names)} (columns: {', '.join(names)})"
            )
        if columns.item not in names:
            return self._known_histories(path, columns.user)
        time = columns.time if columns.time in names else None
        inter = read_interactions(str(path), dataclasses.replace(columns, time=time, weight=None))
        rows = self.item_ids.rows(inter.item_ids.originals(np.arange(1, inter.n_items + 1)))[inter.item - 1]
        keep = rows > 0
        counts = np.bincount(inter.user[keep], minlength=inter.n_users)
        known = np.flatnonzero(counts)
        offsets = np.concatenate([[0], np.cumsum(counts[known])])
        users = inter.user_ids.originals(known)
        return Histories(users, rows[keep], offsets, inter.n_users - len(known), int((~keep).sum()))

    def _known_histories(self, path: str | os.PathLike[str], column: str) -> Histories:
        if isinstance(self.config.data, ByPath):
            raise UserError(f"{path} has no item column, and the run's data is a function: give events (user, item)")
        inter = open_data(self.config.data).inter
        self._check_items(np.asarray(inter.item_ids.values))
        wanted = _read_column(path, column)
        rows = inter.user_ids.rows(wanted)
        known = rows[rows >= 0]
        counts = inter.lengths[known]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        events = np.repeat(inter.offsets[known] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Histories(wanted[rows >= 0], inter.item[events], offsets, unknown_users=int((rows < 0).sum()))

    def predict(self, source: str | os.PathLike[str] | Histories, k: int = 10, *, batch: int = 512) -> pa.Table:
        """The k best items that each user has not seen: user, rank (from 1), item, score; original ids.

        Args:
          source: a file as in `histories`, or histories.

        Raises:
          UserError: what `histories` raises; k is below one.
        """
        self._ranks("predict")
        if k < 1:
            raise UserError(f"predict: top k must be at least 1, got {k}")
        given = source if isinstance(source, Histories) else self.histories(source)
        users, ranks, items, scores = [], [], [], []
        for start, padded in _padded(given, self.config.model.length, batch):
            best, found = jax.device_get(self._top(padded, k))
            real = min(batch, len(given.users) - start)
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

    def _ranks(self, command: str) -> None:
        """Whether this is a model that the commands for one item matrix know.

        Raises:
          UserError: it is another.
        """
        if not isinstance(self.config.model, SASRecConfig) or self.config.model.inputs:
            kind = f"{self.config.model.kind}{' on tables' if self.tables else ''}"
            raise UserError(f"{command}: not there yet for {kind}; `jaxops evaluate` is")

    def _check_items(self, values: np.ndarray) -> None:
        if not np.array_equal(values, self.item_ids.values):
            raise UserError(
                f"the run's data has changed since: {len(values):,} items there now, not the {len(self.item_ids):,}"
                " that the model was trained on"
            )

    @functools.cached_property
    def _top_jitted(self) -> Callable[..., Any]:
        dtype = jnp.dtype(self.config.precision.compute)

        def top(params: Params, batch: Mapping[str, Any], k: int) -> Any:
            params = jax.tree.map(lambda x: x.astype(dtype), params)
            scores = self.model.logits(params, self.model.encode(params, batch, None)[:, -1])
            return top_k_unseen(scores, batch["seen"], k, self.model.n_items)

        return jax.jit(top, static_argnums=2)

    def _top(self, batch: Mapping[str, np.ndarray], k: int) -> Any:
        return self._top_jitted(self.params, batch, k)

    def item_vectors(self) -> pa.Table:
        """Original item ids and their vectors: item, vector (fixed-size list of float32)."""
        self._ranks("export")
        rows = np.arange(1, self.model.n_items + 1)
        vectors = np.asarray(self.model.item_vectors(self.params), np.float32)[rows]
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        return pa.table({"item": pa.array(self.item_ids.originals(rows)), "vector": flat})

    def evaluate(self, parts: tuple[str, ...] = ("valid", "test")) -> dict[str, float]:
        """Metrics on the run's own data, on the devices that are here.

        Raises:
          UserError: the data cannot be opened.
        """
        from jaxops.tasks.rec import build_rec

        task = build_rec(self.config, self.resolved, lambda model: _no_objective)
        if "item_ids" in task.transform:
            self._check_items(task.transform["item_ids"])
        mesh = make_mesh(data=-1)
        out: dict[str, float] = {}
        with jax.set_mesh(mesh):
            # the batch of training may not divide over the devices that are here
            tables = tables_on(task, mesh, -(-self.config.batch.global_ // mesh.size) * mesh.size)
            measure = Measure(task, mesh, tables)
            params = jax.device_put(self.params, jax.sharding.NamedSharding(mesh, jax.P()))
            rows = {}
            if tables is not None:
                lie = tables.sharding
                rows = {name: {"rows": jax.device_put(t["rows"], lie(name))} for name, t in self.tables.items()}
            for part in (part for part in parts if part in task.evaluations):
                values = measure(Weights(params, rows), part)
                out |= {f"{part}/{name}": values[name] for name in values if name not in task.plots}
        return out


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
        tables = checkpoints.load_params(step, "tables", leaf="rows") if config.tables else {}
    on_device = jax.tree.map(jnp.asarray, join(params, frozen))  # once, not with every batch of users
    if isinstance(config.model, CLICK_MODELS):
        return Trained(config, None, on_device, Ids(np.zeros(0, np.int64), first=1), step, resolved, tables)
    values = place.transform("item_ids")
    values = values if values.dtype.kind == "i" else np.char.encode(values.astype(str), "utf-8")
    model = SASRec(config.model, len(values)) if isinstance(config.model, SASRecConfig) else None
    return Trained(config, model, on_device, Ids(values, first=1), step, resolved, tables)


def _padded(given: Histories, length: int, size: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Batches of `size` histories, padded on the left to `length`; `seen` is as wide as the longest of all."""
    counts = np.diff(given.offsets)
    width = -(-max(int(counts.max(initial=1)), 1) // 8) * 8
    for start in range(0, len(given.users), size):
        index = np.minimum(np.arange(start, start + size), len(given.users) - 1)
        first, count = given.offsets[:-1][index], counts[index]
        column = np.arange(length)
        at = (first + count - length)[:, None] + column
        items = np.where(column >= (length - np.minimum(count, length))[:, None], given.items.take(at, mode="clip"), 0)
        wide = np.arange(width)
        seen = np.where(wide < count[:, None], given.items.take(first[:, None] + wide, mode="clip"), 0)
        yield (
            start,
            {
                "id": index.astype(np.int32),
                "items": items.astype(np.int32),
                "seen": seen.astype(np.int32),
            },
        )


def _column_names(path: str | os.PathLike[str]) -> list[str]:
    return _dataset(path).schema.names


def _read_column(path: str | os.PathLike[str], column: str) -> np.ndarray:
    return _dataset(path).to_table(columns=[column])[column].to_numpy()


def _dataset(path: str | os.PathLike[str]) -> Any:
    """A Parquet, CSV or JSONL file (or a folder of Parquet) as an Arrow dataset."""
    import pyarrow.dataset as ds

    suffix = Path(path).suffix.lower()
    kind = {".csv": "csv", ".jsonl": "json", ".json": "json"}.get(suffix, "parquet")
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    try:
        return ds.dataset(str(path), format=kind)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read as {kind}: {str(error).splitlines()[0]}") from None
