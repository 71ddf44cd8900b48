"""Evaluation by batches on the mesh: devices divide the rows, sums are merged, and one fetch ends it."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxops.core.evaluation import Evaluator
from jaxops.core.state import Params
from jaxops.core.sums import Sums
from jaxops.run.passes import Passes
from jaxops.run.task import EvalBatches, Evaluate, Measured, Poll, Task
from jaxops.run.weights import Weights


@dataclasses.dataclass(frozen=True)
class BatchedEvaluation:
    """The evaluation of most tasks: sums over batches of one size.

    Attributes:
      batches: for each part, a function from a batch size to the batches, all of that size.
      sums: (params, batch) -> Sums of one evaluation batch; the batch holds the rows of its tables.
      plots: the names of sums that are arrays, for the summary and the report.
      derive: (part, values of its sums) -> further metrics, which the host computes (those of the order of all scores).
      prepare: a pass over other data before the first batch. Its result joins the weights (the vectors of all items).
    """

    batches: Mapping[str, Callable[[int], EvalBatches]]
    sums: Callable[[Params, Mapping[str, Any]], Sums]
    plots: tuple[str, ...] = ()
    derive: Callable[[str, dict[str, Any]], Mapping[str, float]] = lambda part, found: {}
    prepare: Callable[[Passes, Weights], Weights] | None = None

    @property
    def parts(self) -> Collection[str]:
        """The parts that have batches."""
        return self.batches

    def on(self, task: Task, mesh: Mesh) -> Evaluate:
        """Returns the evaluation on this mesh. It is compiled once, at the first batch."""
        wanted = dict.fromkeys(task.config.evaluate.metrics)
        passes = Passes.of(task.config, task.tables, mesh, task.config.evaluate.batch)
        evaluators: list[Evaluator] = []

        def evaluate(weights: Weights, part: str, step: int, poll: Poll) -> Measured:
            del step
            weights = passes.with_averaged_rows(weights)
            if self.prepare is not None:
                weights = self.prepare(passes, weights)
            batches, reader = passes.planned("queries", self.batches[part](passes.size))
            if not evaluators:
                evaluators.append(Evaluator(self.sums, passes.mesh, passes.dtype, passes.logical, reader))
            found = evaluators[0](weights.params, batches, poll, weights.tables)
            found |= self.derive(part, found)
            parts = {name: found[name] for name in found if name.partition("[")[0] in wanted and "[" in name}
            values = {name: found[name] for name in wanted} | parts
            return Measured(values, {name: found[name] for name in self.plots})

        return evaluate


def evaluate_now(task: Task, mesh: Mesh, weights: Weights, parts: Collection[str]) -> dict[str, float]:
    """Returns the metrics of these weights, as `part/metric`.

    Args:
      task: the task whose evaluation runs.
      mesh: the mesh to evaluate on.
      weights: the weights, placed on the mesh.
      parts: parts such as `valid` and `test`; those that the task lacks are left out.
    """
    out: dict[str, float] = {}
    with jax.set_mesh(mesh):
        evaluate = task.evaluation.on(task, mesh)
        for part in (part for part in parts if part in task.evaluation.parts):
            measured = evaluate(weights, part, 0, lambda: False)
            out |= {f"{part}/{name}": value for name, value in measured.values.items()}
    return out
