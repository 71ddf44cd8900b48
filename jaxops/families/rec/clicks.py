"""Click models put together: many features, binary cross-entropy, probabilities judged by order and by honesty."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxops.config.types import ByPath
from jaxops.core.accumulate import Objective
from jaxops.core.failures import UserError
from jaxops.core.state import Params
from jaxops.core.sums import Sums
from jaxops.data.clicks.clicks import ClickData, new_rows, open_clicks
from jaxops.data.clicks.columns import Own, layout
from jaxops.data.clicks.examples import Examples
from jaxops.data.clicks.spec import ClicksFile, Criteo, MovieLensClicks
from jaxops.evaluate.clicks import click_sums
from jaxops.evaluate.grouped import GroupAuc, with_slices
from jaxops.families.rec.config import RecConfig
from jaxops.families.rec.tables_config import features_of, match
from jaxops.models.dcn import DCNv2, DCNv2Config
from jaxops.models.dlrm import DLRM, DLRMConfig
from jaxops.models.inputs import Input
from jaxops.models.linear import Linear, LinearConfig
from jaxops.objectives.clicks import bce, multi_task
from jaxops.run.callables import require_callable
from jaxops.run.task import Task
from jaxops.tables.spec import TableSpec


def build_clicks(
    config: RecConfig, resolved: dict[str, Any], objective: Callable[[Any], Objective] | None = None
) -> Task:
    """The task of a click model: every categorical feature of the data is read, each from the table that names it.

    Raises:
      UserError: the data cannot be opened; a feature without a table, or a table that nobody reads.
    """
    assert isinstance(config.data, ClicksFile | Criteo | MovieLensClicks)
    reads = _reads(config)
    maps = {name: (table.ids, None if table.rows == "auto" else table.rows) for name, table in config.tables.items()}
    data = open_clicks(config.data, maps, reads, config.evaluate.slices)
    if "gauc" in config.evaluate.metrics and data.examples.user is None:
        raise UserError("evaluate.metrics: gauc needs to know whose an example is: data.columns.user")
    match(config.tables, dict.fromkeys(data.features, "data"), dict.fromkeys(data.features, "a column"))
    model = build_model(config, data.features, len(data.numeric), len(data.labels))
    return Task(
        config=config,
        resolved=resolved,
        model=model,
        objective=_objective(config, model, data.labels, objective),
        source=data.source(config.run.seed),
        evaluations={part: functools.partial(data.batches, part) for part in ("valid", "test")},
        metrics=_metrics(config, model, data),
        rules=[(pattern, axes) for pattern, axes in config.sharding.rules] + model.rules,
        logical=config.sharding.logical,
        loss_weights=config.loss_weights,
        inspection=data.inspection,
        transform=data.transform,
        tables={name: table.spec(data.rows[name], reads[name]) for name, table in config.tables.items()},
        plots=("reliability",),
    )


class ClickModel(NamedTuple):
    """A trained click model as it is asked: its tables, and the probability of each label for rows of a file.

    Attributes:
      model: as training has it.
      rows: a file as examples, and its columns with original ids.
      click: (params, batch) -> float32 [batch, labels].
    """

    model: Any
    labels: tuple[str, ...]
    tables: dict[str, TableSpec]
    rows: Callable[[str | os.PathLike[str]], tuple[Examples, Own]]
    click: Callable[[Params, Mapping[str, Any]], Array]


def restore_clicks(config: RecConfig, read: Callable[[str], np.ndarray]) -> ClickModel:
    """The model of a run, of whose transform `read` gives the arrays."""
    assert isinstance(config.data, ClicksFile | Criteo | MovieLensClicks)
    has, reads = layout(config.data), _reads(config)
    model = build_model(config, has.features, len(has.numeric), len(has.labels))
    maps = {name: table.ids for name, table in config.tables.items()}
    specs = {name: table.spec(int(read(f"map.{name}.rows")[0]), reads[name]) for name, table in config.tables.items()}

    def click(params: Params, batch: Mapping[str, Any]) -> Array:
        logits = model.apply(params, batch, None).astype(jnp.float32)
        return jax.nn.sigmoid(logits.reshape(-1, len(has.labels)))

    rows = functools.partial(new_rows, config.data, maps=maps, tables=reads, read=read)
    return ClickModel(model, has.labels, specs, rows, click)


def _reads(config: RecConfig) -> dict[str, tuple[str, ...]]:
    """By table, the features that read it."""
    return {name: table.features or (name,) for name, table in config.tables.items()}


def _objective(
    config: RecConfig, model: Any, labels: tuple[str, ...], given: Callable[[Any], Objective] | None
) -> Objective:
    if given is not None or isinstance(config.objective, ByPath):
        made = given(model) if given is not None else config.objective.call(model)  # type: ignore[union-attr]
        require_callable("objective: what the factory returned", made, "params", "batch", "key")
        return made
    return bce(model) if len(labels) == 1 else multi_task(model, labels)


def build_model(config: RecConfig, features: Mapping[str, bool], numeric: int, outputs: int) -> Any:
    """The model of the config for these features (name -> whether it is a bag)."""
    table = {name: config.tables[owner] for name, owner in features_of(config.tables).items()}
    inputs = [Input(name=name, dim=table[name].dim, bag=bag, pool=table[name].pool) for name, bag in features.items()]
    if isinstance(config.model, DLRMConfig):
        return DLRM(config.model, inputs, numeric, outputs)
    if isinstance(config.model, DCNv2Config):
        return DCNv2(config.model, inputs, numeric, outputs)
    assert isinstance(config.model, LinearConfig)
    return Linear(config.model, inputs, numeric, outputs)


def _metrics(config: RecConfig, model: Any, data: ClickData) -> Callable[[Params, Mapping[str, Any]], Sums]:
    """Of the first label under plain names, of the others as `auc[NAME]` and so on; GAUC of the first, by user."""
    examples = data.examples
    by_user = "gauc" in config.evaluate.metrics and examples.user is not None
    groups = None
    if by_user and examples.user is not None:
        label = np.where(examples.user < 0, np.nan, examples.labels[:, 0])  # examples of nobody are no group
        groups = GroupAuc(label, examples.user)

    def metrics(params: Params, batch: Mapping[str, Array]) -> Sums:
        shape = (batch["label"].shape[0], len(data.labels))
        logits, label = model.apply(params, batch, None).reshape(shape), batch["label"].reshape(shape)

        def of(at: int, batch: Mapping[str, Array]) -> Sums:
            known = ~jnp.isnan(label[:, at])
            weight = batch["weight"] * known.astype(jnp.float32)
            return click_sums(logits[:, at], jnp.where(known, label[:, at], 0), weight)

        def first(batch: Mapping[str, Array]) -> Sums:
            return of(0, batch) | (groups.sums(logits[:, 0], batch) if groups else {})

        out = with_slices(first, batch)
        for at, name in enumerate(data.labels[1:], 1):
            out |= {f"{metric}[{name}]": value for metric, value in of(at, batch).items()}
        return out

    return metrics
