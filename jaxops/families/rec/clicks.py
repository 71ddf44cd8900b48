"""Click models: a task from many features and binary cross-entropy, judged by AUC and calibration, and its serving."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array

from jaxops.config.load import Loaded
from jaxops.config.types import ByPath
from jaxops.core.failures import UserError
from jaxops.core.state import Params
from jaxops.core.sums import Sums
from jaxops.data.clicks.clicks import ClickData, new_rows, open_clicks
from jaxops.data.clicks.columns import Own, given_columns, layout
from jaxops.data.clicks.examples import PART_ROW, ExampleBatches, Examples
from jaxops.data.clicks.spec import ClicksFile
from jaxops.evaluate.clicks import click_sums
from jaxops.evaluate.grouped import GroupAuc, Scores, area_under_curve_exact, with_slices
from jaxops.families.rec.carry_rows import carry_rows
from jaxops.families.rec.config import RecConfig
from jaxops.families.rec.options import Predict
from jaxops.families.rec.own_model import require_parts
from jaxops.families.rec.serving import same_transform
from jaxops.families.rec.tables_config import features_of, match
from jaxops.families.rec.trained import digest
from jaxops.models.inputs import ExampleFeatures, Input
from jaxops.run.batched import BatchedEvaluation
from jaxops.run.callables import objective_from
from jaxops.run.family import Given
from jaxops.run.given_table import as_file
from jaxops.run.load import evaluate_saved
from jaxops.run.saved_run import SavedRun
from jaxops.run.task import About, Task, of_config
from jaxops.tables.spec import TableSpec

LOGITS = "logits"
"""The name in the sums of an evaluation under which the logits of a part are kept. It is no metric."""


def build(loaded: Loaded[RecConfig], given: Given) -> Task:
    """Builds the task of a click model, which reads every categorical feature of the data from the table that names it.

    Raises:
      UserError: the data cannot be opened, a feature has no table, or nothing reads a table.
    """
    config = loaded.config
    if given.data is not None:
        raise UserError("data: a click model learns from clicks in files: expected kind clicks, criteo or movielens")
    reads = _reads(config)
    maps = {name: (table.ids, None if table.rows == "auto" else table.rows) for name, table in config.tables.items()}
    data = open_clicks(config.data, maps, reads, config.evaluate.slices)  # type: ignore[arg-type]
    if "gauc" in config.evaluate.metrics and data.examples.user is None:
        raise UserError("evaluate.metrics: gauc needs to know whose an example is: data.columns.user")
    match(config.tables, dict.fromkeys(data.features, "data"), dict.fromkeys(data.features, "a column"))
    specs = {name: table.spec(data.rows[name], reads[name]) for name, table in config.tables.items()}
    model = build_click_model(config, given, data.features, len(data.numeric), len(data.labels))
    judge = ClickMetrics(config, model, data)
    return Task(
        **of_config(config, loaded.resolved, model),
        objective=objective_from(config.objective, given.objective, model, data.labels),
        source=data.source(config.run.seed),
        evaluation=BatchedEvaluation(
            {part: functools.partial(data.batches, part) for part in ("valid", "test")},
            judge.sums,
            plots=("reliability",),
            derive=judge.derive,
        ),
        undefined=judge.undefined(),
        inspection={**data.inspection, "features": digest(_held(data.examples))},
        transform=data.transform,
        tables=specs,
        carry_rows=functools.partial(carry_rows, config, data.transform, specs, inputs=_inputs),
        about=About(model=getattr(type(config.model), "label", config.model.kind)),
    )


def build_click_model(config: RecConfig, given: Given, features: Mapping[str, bool], numeric: int, outputs: int) -> Any:
    """Builds the model that the config or Python names.

    Args:
      config: the run's config.
      given: the factories of Python.
      features: the categorical features, each with True where it is a bag.
      numeric: the number of numeric features.
      outputs: the number of labels.

    Raises:
      UserError: the features do not suit the model, or a user's factory returned something that is no click model.
    """
    table = {name: config.tables[owner] for name, owner in features_of(config.tables).items()}
    inputs = tuple(
        Input(name=name, dim=table[name].dim, bag=bag, pool=table[name].pool) for name, bag in features.items()
    )
    data = ExampleFeatures(inputs, numeric, outputs)
    chosen: Any = config.model
    if given.model is None and not isinstance(chosen, ByPath):
        return chosen.build(data)
    model = given.model(data) if given.model is not None else chosen.call(data)
    return require_parts(model, "a click model", {"apply": ("params", "batch", "key")})


class ServedClicks:
    """A trained click model, which predicts the probability of each label for rows of a file."""

    def __init__(self, saved: SavedRun):
        self.saved, config = saved, saved.config
        has, reads = layout(config.data), _reads(config)
        self.labels = has.labels
        self.model = build_click_model(config, Given(), has.features, len(has.numeric), len(has.labels))
        maps = {name: table.ids for name, table in config.tables.items()}
        self.tables: dict[str, TableSpec] = {
            name: table.spec(int(saved.transform(f"map.{name}.rows")[0]), reads[name])
            for name, table in config.tables.items()
        }
        saved.expect(self.model.shapes, self.tables)
        self._rows: Callable[[str | os.PathLike[str]], tuple[Examples, Own]] = functools.partial(
            new_rows, config.data, maps=maps, tables=reads, read=saved.transform
        )

    @property
    def params(self) -> Params:
        """The parameters that are served, as numpy arrays."""
        return self.saved.weights.params

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self.saved.step

    def predict(
        self,
        source: Any,
        options: Predict | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        batch: int = 512,
        **keywords: Any,
    ) -> pa.Table:
        """Predicts the probability of each label, float32, for each row in order, beside the row's own columns.

        `user` and `item` are the ids of the row, where the run's data names those columns. A column of the source that
        has the name of one of those or of a label comes along as NAME_given.

        Args:
          source: a file with the columns of the run's data, a pyarrow table or a data frame.
          options: the options of `jaxops predict`, none of which a click model takes.
          say: not used.
          batch: the number of rows in a batch.
          keywords: the fields of `Predict`, in place of `options`.

        Raises:
          UserError: the source does not fit, or an option is given.
        """
        del say
        given = options or Predict(**keywords)
        for field in dataclasses.fields(given):
            if getattr(given, field.name) is not None:
                name, where = field.name.replace("_", "-"), f"{self.saved.folder.where} predicts clicks of rows"
                raise UserError(f"--{name}: {where}; it searches no items, leave --{name} out")
        with as_file(source) as path:
            examples, own = self._rows(path)
            given_table = given_columns(self.saved.config.data, path)
        passes = self.saved.passes(self.tables, batch)
        batches = ExampleBatches(examples, np.arange(len(examples.weight)), passes.size)
        with jax.set_mesh(self.saved.mesh):
            weights = self.saved.placed(passes)
            parts = [np.asarray(part) for part in passes.over("rows", self._probabilities, weights, batches)]
        found = np.concatenate(parts)[: len(examples.weight)]
        clicks = {label: pa.array(found[:, at]) for at, label in enumerate(self.labels)}
        whose = {kind: ids for kind, ids in own.who.items() if kind not in clicks}
        held = {name for name in whose if name == _who_column(self.saved.config.data, name)}
        along = {name: given_table[name] for name in given_table.column_names if name not in held}
        taken = {*whose, *clicks}
        for name in [name for name in along if name in taken]:
            other = f"{name}_given"
            while other in taken or other in along:
                other += "_given"
            along = {other if column == name else column: values for column, values in along.items()}
        return pa.table(whose | along | clicks)

    def _probabilities(self, params: Params, batch: Mapping[str, Any]) -> Array:
        logits = self.model.apply(params, batch, None).astype(jnp.float32)
        return jax.nn.sigmoid(logits.reshape(-1, len(self.labels)))

    def export(self, path: Path, options: Any = None, **keywords: Any) -> str:
        """Raises an error, since a click model has no item vectors to export.

        Raises:
          UserError: always.
        """
        del path, options, keywords
        self.item_vectors()

    def item_vectors(self) -> NoReturn:
        """Raises an error, since a click model has no item vectors.

        Raises:
          UserError: always.
        """
        raise UserError(f"{self.saved.config.model.kind} predicts clicks: it ranks no items and has no item vectors")

    def evaluate(
        self,
        parts: tuple[str, ...] = ("valid", "test"),
        *,
        other_data: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> dict[str, float]:
        """Returns the metrics on the run's own data, computed on the devices of this machine.

        Raises:
          UserError: the data cannot be opened or have changed, or `other_data` is true.
        """
        del say
        if other_data:
            raise UserError(
                f"--other-data: {self.saved.folder.where} predicts clicks of rows, and keeps no record of the rows that"
                " it was trained on. `jaxops predict` writes its probabilities beside the columns of new rows: judge"
                " those"
            )
        return evaluate_saved(self.saved, parts, lambda task: same_transform(self.saved, task.transform))


def _who_column(data: Any, kind: str) -> str | None:
    """Returns the column that holds the ids of this kind, `user` or `item`; None where the config names none."""
    return getattr(data.columns, kind) if isinstance(data, ClicksFile) else kind


def restore(saved: SavedRun) -> ServedClicks:
    """Restores the trained click model of a run.

    Raises:
      UserError: the run folder lacks a part of its transform.
    """
    return ServedClicks(saved)


def _inputs(config: RecConfig) -> dict[str, Sequence[str]]:
    has = layout(config.data)  # type: ignore[arg-type]
    return {"features of data": [*has.features], "numeric features of data": has.numeric}


def _reads(config: RecConfig) -> dict[str, tuple[str, ...]]:
    """Returns the features of each table."""
    return {name: table.features or (name,) for name, table in config.tables.items()}


def _held(examples: Examples) -> dict[str, np.ndarray]:
    """Returns the arrays of the examples by name, without labels, masks and users, to compute a digest of them."""
    found = {"numeric": examples.numeric, "weight": examples.weight}
    for name, column in examples.features.items():
        parts = {"codes": column.codes, "index": column.index, "weights": column.weights}
        found |= {f"{name}/{part}": values for part, values in parts.items() if values is not None}
    return found


class ClickMetrics:
    """Computes the metrics of a click model. The first label has plain names (`auc`), another has `auc[NAME]`.

    The devices compute metrics that are sums over examples. AUC and GAUC depend on the order of all scores, so the host
    computes them exactly from the logits of the whole part. GAUC is AUC within each user, for the first label alone.
    """

    def __init__(self, config: RecConfig, model: Any, data: ClickData):
        self._model, self._labels, self._examples = model, data.labels, data.examples
        self._rows = {part: data.parts[part] for part in ("valid", "test")}
        self._scores = Scores(max(map(len, self._rows.values())))
        self._by_user = "gauc" in config.evaluate.metrics and data.examples.user is not None
        self._ordered = bool({"auc", "gauc"} & {*config.evaluate.metrics})

    def sums(self, params: Params, batch: Mapping[str, Array]) -> Sums:
        """Returns the sums of a batch and of its slices, and under `LOGITS` the logits that `derive` needs."""
        shape = (batch["label"].shape[0], len(self._labels))
        logits, label = self._model.apply(params, batch, None).reshape(shape), batch["label"].reshape(shape)

        def of(at: int, batch: Mapping[str, Array]) -> Sums:
            known = ~jnp.isnan(label[:, at])
            weight = batch["weight"] * known.astype(jnp.float32)
            return click_sums(logits[:, at], jnp.where(known, label[:, at], 0), weight)

        out = with_slices(functools.partial(of, 0), batch)
        for at, name in enumerate(self._labels[1:], 1):
            out |= {f"{metric}[{name}]": value for metric, value in of(at, batch).items()}
        if self._ordered:
            out[LOGITS] = self._scores.sums(logits, batch[PART_ROW], batch[PART_ROW] >= 0)
        return out

    def derive(self, part: str, found: Mapping[str, Any]) -> dict[str, float]:
        """Computes AUC and GAUC of a part and of its slices, and AUC of its other labels, on the host.

        Args:
          part: `valid` or `test`.
          found: the values of `sums` over the whole part, of which `LOGITS` is read.
        """
        if not self._ordered:
            return {}
        rows, examples = self._rows[part], self._examples
        labels, weights = examples.labels[rows].T.astype(np.float64), examples.weight[rows]
        logits = np.asarray(found[LOGITS])[:, : len(rows)]
        masks = {"": np.ones(len(rows), bool)} | {f"[{name}]": mask[rows] for name, mask in examples.masks.items()}
        out: dict[str, float] = {}
        for name, mask in masks.items():
            held = (labels[0][mask], logits[0][mask], weights[mask])
            out[f"auc{name}"] = area_under_curve_exact(*held)
            if self._by_user and examples.user is not None:
                user = examples.user[rows][mask]
                # GAUC counts impressions: weights of zero leave out, others are alike; examples of nobody are no group
                known = np.where((user < 0) | (held[2] == 0), np.nan, held[0])
                out[f"gauc{name}"] = GroupAuc(known, user).value(held[1])
        for at, name in enumerate(self._labels[1:], 1):
            out[f"auc[{name}]"] = area_under_curve_exact(labels[at], logits[at], weights)
        return out

    def undefined(self) -> dict[str, dict[str, str]]:
        """Returns the metrics of the first label that no model can have, as {part: {metric: reason}}.

        AUC, for example, is undefined where all examples are clicks.
        """
        return {part: self._undefined(rows) for part, rows in self._rows.items()}

    def _undefined(self, rows: np.ndarray) -> dict[str, str]:
        label = np.where(self._examples.weight[rows] > 0, self._examples.labels[rows, 0], np.nan)
        seen = np.unique(label[~np.isnan(label)])
        if not len(seen):
            return dict.fromkeys(("auc", "gauc", "log_loss", "ne", "calibration", "ece"), "it has no label that counts")
        why: dict[str, str] = {}
        if len(seen) == 1:
            one = "clicks" if seen[0] else "non-clicks"
            why = dict.fromkeys(("auc", "gauc", "ne"), f"all of its {len(rows):,} examples are {one}")
            why |= {} if seen[0] else {"calibration": why["auc"]}
        elif self._by_user and self._examples.user is not None:
            user = self._examples.user[rows]
            known = np.where(user < 0, np.nan, label)
            if np.isnan(GroupAuc(known, user).value(np.zeros(len(rows)))):
                why["gauc"] = "no user of it has both a click and a non-click"
        return why
