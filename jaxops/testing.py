"""Checks for users' own tests: of an objective, of a task on every mesh layout, and the references they compare with.

`pytest_plugins = ["jaxops.audit.pytest_plugin"]` in a `conftest.py` makes a suite strict (docs/audit.md).

Example:
    >>> import jax, jax.numpy as jnp, jaxops
    >>> def objective(params, batch, key):
    ...     error = batch["x"] @ params["w"] - batch["y"]
    ...     return {"loss/mse": jaxops.Sum.of(error**2, batch["weight"])}
    >>> rows = {"x": jnp.ones((8, 2)), "y": jnp.arange(8.0), "weight": jnp.arange(8.0) % 3, "id": jnp.arange(8)}
    >>> found = jaxops.testing.check_objective(objective, {"w": jnp.ones(2)}, rows)
    >>> [one.check for one in found if one.verdict == "passed"]
    ['counts', 'sums', 'examples', 'gradients']
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxops.audit import reference as reference
from jaxops.audit.audit import Report as Report
from jaxops.audit.audit import audit as audit
from jaxops.audit.contract import ObjectiveCase, contract_findings
from jaxops.audit.finding import Finding as Finding
from jaxops.audit.finding import require as require
from jaxops.audit.layouts import BFLOAT16 as BFLOAT16
from jaxops.audit.layouts import LAYOUTS as LAYOUTS
from jaxops.audit.layouts import Agreement as Agreement
from jaxops.audit.layouts import check as check
from jaxops.audit.layouts import compare_layouts as compare_layouts
from jaxops.audit.updates import packing_finding
from jaxops.core.accumulate import Objective
from jaxops.core.sharding import Rule
from jaxops.run.task import Task


def check_objective(
    objective: Objective,
    params: PyTree,
    batch: Mapping[str, Any],
    *,
    block: int = 1,
    frozen: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
) -> list[Finding]:
    """Checks an objective against the contract on one device: counts, sums, examples, keys, gradients and packing.

    docs/audit.md says what each check finds.

    Args:
      objective: (params, batch, key) -> Sums.
      params: its parameters.
      batch: a batch of at least two blocks, every leaf with rows.
      block: the number of neighbouring examples that the objective couples.
      frozen: path patterns of parameters that are not trained.
      weights: the weight of each loss term (default 1).

    Raises:
      AssertionError: a check failed; the message says why.

    Example:
        >>> import jax.numpy as jnp, jaxops
        >>> def mean(params, batch, key):  # a mean is no sum: two microbatches would weigh their examples otherwise
        ...     error = (batch["x"] - params["w"]) ** 2
        ...     return {"loss/mse": jaxops.Sum(jnp.mean(error), jnp.ones(()))}
        >>> check_objective(mean, {"w": jnp.zeros(())}, {"x": jnp.arange(4.0)})
        Traceback (most recent call last):
        ...
        AssertionError: FAILED  sums           the count of loss/mse is not a sum ...
    """
    case = ObjectiveCase(objective, params, batch, block=block, frozen=frozen, weights=weights)
    return require([*contract_findings(case), packing_finding(case)])


class _Given:
    """Parameters and one batch, as a task's model and source."""

    padding: dict[str, str] = {}

    def __init__(self, params: PyTree, batch: Mapping[str, Any], rules: Sequence[Rule]) -> None:
        self._params, self._batch = jax.tree.map(np.asarray, (params, dict(batch)))
        self.rules, self.examples = list(rules), len(jax.tree.leaves(self._batch)[0])
        self.shapes = jax.eval_shape(lambda: self.init(None))

    def init(self, key: Any) -> PyTree:
        """Returns the parameters."""
        del key
        return jax.tree.map(jax.numpy.asarray, self._params)

    def batch(self, cursor: int, size: int) -> dict[str, Any]:
        """Returns the batch, whatever is asked for."""
        del cursor
        found: dict[str, Any] = jax.tree.map(lambda x: x[: len(x) * size // self.examples], self._batch)
        return found


def check_invariance(
    objective: Objective,
    params: PyTree,
    batch: Mapping[str, Any],
    *,
    layouts: Sequence[dict[str, int]] = LAYOUTS,
    accumulations: Sequence[int] = (1, 2),
    rules: Sequence[Rule] = (("", ()),),
    block: int = 1,
    frozen: Sequence[str] = (),
) -> list[Agreement]:
    """Checks that an update is the same on every mesh layout and in microbatches, as `check` does for a whole task.

    Args:
      objective: (params, batch, key) -> Sums.
      params: its parameters.
      batch: a batch; the layouts and microbatches must divide it.
      layouts: mesh layouts, each with the sizes of its axes.
      accumulations: numbers of microbatches to try with each layout.
      rules: sharding rules of the parameters; by default every device holds all.
      block: the number of neighbouring examples that the objective couples.
      frozen: path patterns of parameters that are not trained.

    Raises:
      UserError: a parameter is multiplied while it is sharded over fsdp.
      AssertionError: an update differs.

    Example:
        >>> import jax.numpy as jnp, jaxops
        >>> def objective(params, batch, key):
        ...     return {"loss/mse": jaxops.Sum.of((batch["x"] - params["w"]) ** 2, batch["weight"])}
        >>> rows = {"x": jnp.arange(16.0), "weight": jnp.arange(16.0) % 3}
        >>> (found,) = check_invariance(objective, {"w": jnp.zeros(())}, rows, layouts=[{"data": 1}], accumulations=[2])
        >>> found.gradient < 1e-6
        True
    """
    given = _Given(params, batch, rules)
    task = Task(
        config=None,
        resolved={},
        model=given,
        objective=objective,
        source=given,
        rules=given.rules,
        block=block,
        frozen=tuple(frozen),
    )
    return check(task, layouts, accumulations, batch_size=given.examples)
