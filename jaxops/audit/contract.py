"""Checks of an objective against the one contract, on one device: what no compiler sees and any batch may reveal.

An objective returns sums over examples. Its counts depend on the batch alone, its draws on the ids of examples, and no
example depends on another outside of a declared block. Tested in tests/audit/test_contract.py.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxops.audit.finding import Finding
from jaxops.audit.layouts import mesh_of
from jaxops.core.accumulate import Objective, loss_counts, weighted_loss
from jaxops.core.random import SHARED_DRAWS
from jaxops.core.sharding import named_leaves
from jaxops.core.state import join, split
from jaxops.core.sums import LOSS, Max, Sum, Sums

SUM_BOUND = 1e-4
"""The largest difference of a total from the total of its parts, over the largest of these: float32 rounds far less."""
SMALL = 0.01
"""Totals are not expected to be more exact than SUM_BOUND of this for each count: terms of both signs may cancel."""
MOVED = 1_000_003
"""Added to the ids of examples, to see whether draws follow them."""
RATE = 0.1
"""The rate of the step after which gradients are looked at again: the factor of a kernel of zeros has none before."""


class ObjectiveCase:
    """An objective with parameters and one batch, evaluated on one device.

    Args:
      objective: (params, batch, key) -> Sums.
      params: its parameters.
      batch: a batch as the objective sees it, all leaves with rows; looked-up rows in "rows".
      block: the number of neighbouring examples that the objective may couple.
      frozen: patterns of parameters that are not trained.
      weights: the weight of each loss term (default 1).
    """

    def __init__(
        self,
        objective: Objective,
        params: PyTree,
        batch: Mapping[str, Any],
        *,
        block: int = 1,
        frozen: Sequence[str] = (),
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.objective, self.block, self.frozen, self.weights = objective, block, tuple(frozen), dict(weights or {})
        self.params, self.batch = jax.tree.map(np.asarray, (params, dict(batch)))
        self.blocks = len(jax.tree.leaves(self.batch)[0]) // block
        whole = jax.sharding.auto_axes(objective, out_sharding=P())
        self._mesh = mesh_of({"data": 1})
        self._run = jax.jit(whole)
        self.whole = whole

    def sums(self, batch: Mapping[str, Any], key: Array | None) -> Sums:
        """Returns the sums of a batch, on the host."""
        with jax.set_mesh(self._mesh):
            found: Sums = jax.device_get(self._run(self.params, batch, key))
        return found

    def on_mesh(self, fn: Callable[[], Any]) -> Any:
        """Calls `fn` inside the mesh of one device."""
        with jax.set_mesh(self._mesh):
            return fn()

    def pick(self, blocks: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Returns the batch made of these blocks; a leaf with more rows than examples is cut in proportion."""

        def one(x: np.ndarray) -> np.ndarray:
            return x.reshape(self.blocks, -1, *x.shape[1:])[np.asarray(blocks, np.int64)].reshape(-1, *x.shape[1:])

        found: dict[str, Any] = jax.tree.map(one, self.batch)
        return found

    @functools.cached_property
    def trained(self) -> tuple[PyTree, PyTree]:
        """The parameters that are trained, and the frozen ones."""
        return split(self.params, self.frozen) if self.frozen else (self.params, {})

    @functools.cached_property
    def halves(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every other block, as microbatches take them."""
        even = self.blocks // 2 * 2
        return self.pick(range(0, even, 2)), self.pick(range(1, even, 2))

    @functools.cached_property
    def both(self) -> dict[str, Any]:
        """The blocks of both halves; of a batch that is one block, that block."""
        return self.pick(range(self.blocks // 2 * 2 or self.blocks))


def contract_findings(case: ObjectiveCase) -> Iterator[Finding]:
    """Yields the findings of all checks of the contract."""
    yield counts_finding(case)
    yield sums_finding(case)
    yield examples_finding(case)
    yield keys_finding(case)
    yield gradients_finding(case)


def counts_finding(case: ObjectiveCase) -> Finding:
    """Checks that the counts of loss terms depend on the batch alone; a pass of its own computes them without model."""

    def counts(params: PyTree) -> list[Array]:
        return list(loss_counts(case.whole(params, case.batch, jax.random.key(0))).values())

    traced = case.on_mesh(lambda: jax.make_jaxpr(counts)(case.params))
    used = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))[1]
    reached = [path for (path, _), reads in zip(named_leaves(case.params), used, strict=True) if reads]
    if not reached:
        return Finding("counts", "passed", "the counts of loss terms depend on the batch alone")
    moved = _elsewhere(case.params)
    run = case.on_mesh(lambda: jax.device_get(jax.jit(lambda one, two: (counts(one), counts(two)))(case.params, moved)))
    apart = max(float(np.max(np.abs(a - b), initial=0)) for a, b in zip(*run, strict=True))
    named = ", ".join(reached[:3]) + (", ..." if len(reached) > 3 else "")
    problem = f"counts of loss terms change with parameters ({named}): count what the batch says, not what is predicted"
    why = f"counts have the same values for other parameters, though they are computed with {named}"
    return Finding.of("counts", problem if apart else None, why, apart, 0.0)


def _elsewhere(params: PyTree) -> PyTree:
    """Returns other parameters of the same kind: each leaf moved by draws as large as its entries."""
    draw = np.random.default_rng(0)

    def one(x: np.ndarray) -> np.ndarray:
        if not jax.dtypes.issubdtype(x.dtype, np.floating):
            return x
        wide = x.astype(np.float32)
        return (wide + (np.std(wide) + 0.1) * draw.normal(size=x.shape)).astype(x.dtype)

    return jax.tree.map(one, params)


def sums_finding(case: ObjectiveCase) -> Finding:
    """Checks that totals and counts of a batch are the sums of those of its parts, in evaluation."""
    if case.blocks < 2:
        return Finding.skipped("sums", "the batch is one block, which has no parts")
    name, apart, counts = _additivity(case, None)
    if apart <= SUM_BOUND:
        return Finding(
            "sums", "passed", "totals and counts are the sums of those of parts of a batch", apart, SUM_BOUND
        )
    if counts:
        problem = f"the count of {name} is not a sum over examples: return the total and the count, never a mean"
    else:
        problem = (
            f"the total of {name} is not a sum over examples: it is divided, or examples depend on each other"
            f" (block is {case.block})"
        )
    return Finding("sums", "failed", problem, apart, SUM_BOUND)


def examples_finding(case: ObjectiveCase) -> Finding:
    """Checks that no example depends on another one: f(AB) + f(BA) = f(AA) + f(BB) for the totals of two halves."""
    if case.blocks < 2:
        return Finding.skipped("examples", "the batch is one block, whose examples may depend on each other")
    a, b = (range(0, case.blocks // 2 * 2, 2), range(1, case.blocks // 2 * 2, 2))
    mixed = lambda first, second: case.sums(case.pick(np.stack([first, second], axis=1).reshape(-1)), None)
    ab, ba, aa, bb = mixed(a, b), mixed(b, a), mixed(a, a), mixed(b, b)
    apart, worst = 0.0, ""
    for name in _losses(ab):
        total = [np.float64(one[name].total) for one in (ab, ba, aa, bb)]  # type: ignore[union-attr]
        scale = sum(map(abs, total)) + SMALL * float(ab[name].count)  # type: ignore[union-attr]
        found = float(abs(total[0] + total[1] - total[2] - total[3]) / (scale or 1.0))
        apart, worst = max((apart, worst), (found if np.isfinite(found) else np.inf, name))
    problem = (
        f"{worst} of an example depends on other examples: declare how many neighbours are coupled (block), or compute"
        " statistics of a group before the update"
    )
    return Finding.of(
        "examples", problem if apart > SUM_BOUND else None, "no example depends on another block", apart, SUM_BOUND
    )


def keys_finding(case: ObjectiveCase) -> Finding:
    """Checks that random draws follow the ids of examples: not their places, and not the key alone."""
    one, two = jax.random.key(1), jax.random.key(2)

    def losses(batch: Mapping[str, Any], key: Array) -> list[float]:
        sums = case.sums(batch, key)
        return [float(sums[name].total) for name in _losses(sums)]  # type: ignore[union-attr]

    if losses(case.both, one) == losses(case.both, two):
        return Finding.skipped("keys", "no loss draws anything: it is the same for another key")
    if case.blocks >= 2 and _additivity(case, None)[1] <= SUM_BOUND:
        name, apart, _ = _additivity(case, one)
        if apart > SUM_BOUND:
            return Finding(
                "keys",
                "failed",
                f"draws of {name} follow an example's place in the batch, which microbatches and devices change: make"
                " keys by jaxops.example_keys(key, batch['id'])",
                apart,
                SUM_BOUND,
            )
    if "id" not in case.both:
        return Finding("keys", "failed", "the batch has no `id`, so that draws cannot follow an example")
    renamed = {**case.both, "id": case.both["id"] + np.asarray(MOVED, case.both["id"].dtype)}
    if losses(case.both, one) != losses(renamed, one):
        return Finding("keys", "passed", "draws follow the ids of examples")
    if shared := getattr(case.objective, SHARED_DRAWS, None):
        return Finding("keys", "passed", f"all draws are shared by the examples of a step, as declared: {shared}")
    return Finding(
        "keys",
        "failed",
        "all examples of a step get the same draws, whatever their ids: make keys by jaxops.example_keys(key,"
        " batch['id']), or declare what is shared by jaxops.core.random.shared_draws(objective, what)",
    )


def gradients_finding(case: ObjectiveCase) -> Finding:
    """Checks that every trained parameter has a finite gradient, and one that is not zero in one of two steps.

    A leaf may have none where the loss is the same for all its values though it is read: a bias that cancels.
    """
    frozen, rows = case.trained[1], case.batch.get("rows")

    def loss(both: tuple[PyTree, PyTree], key: Array) -> Array:
        batch = case.batch if rows is None else {**case.batch, "rows": both[1]}
        sums = case.whole(join(both[0], frozen), batch, key)
        return weighted_loss(sums, loss_counts(sums), case.weights)

    run = jax.jit(jax.grad(loss))
    point = start = (case.trained[0], rows)
    dead: set[str] | None = None
    for at in range(2):
        grads = jax.device_get(case.on_mesh(functools.partial(run, point, jax.random.key(at))))
        named = dict(_named(grads))
        bad = [path for path, x in named.items() if not np.isfinite(x).all()]
        if bad:
            return Finding("gradients", "failed", f"the gradient is not finite: {', '.join(bad[:6])}", len(bad), 0)
        zero = {path for path, x in named.items() if x.size and not np.any(x)}
        dead = zero if dead is None else dead & zero
        point = jax.tree.map(lambda x, g: (x - RATE * g).astype(x.dtype), point, grads)
    cancels = sorted(_cancelling(case, loss, start, dead or set()))
    lost = sorted((dead or set()) - set(cancels))
    problem = (
        f"the gradient is zero in two steps: {', '.join(lost[:6])}: unused, or cut off (stop_gradient, argmax); freeze"
        " what is not trained (optimizer.frozen)"
    )
    why = f"{len(named) - len(cancels)} leaves have finite gradients that are not zero"
    why += f"; the loss is the same for any {', '.join(cancels[:3])}" if cancels else ""
    return Finding.of("gradients", problem if lost else None, why, len(lost), 0)


def _named(both: tuple[PyTree, PyTree]) -> list[tuple[str, Any]]:
    """Returns the leaves of parameters and looked-up rows by path."""
    rows = {} if both[1] is None else {"rows": both[1]}
    return [*((path, x) for path, x in named_leaves(both[0])), *((path, x) for path, x in named_leaves(rows))]


def _cancelling(
    case: ObjectiveCase, loss: Callable[..., Array], start: tuple[PyTree, PyTree], dead: set[str]
) -> Iterator[str]:
    """Yields the leaves among `dead` that the loss reads, and for any values of which it is the same."""
    if not dead:
        return
    key = jax.random.key(0)
    traced = case.on_mesh(lambda: jax.make_jaxpr(loss)(start, key))
    reads = dict(zip((path for path, _ in _named(start)), dce_jaxpr(traced.jaxpr, [True])[1], strict=False))
    moved = _elsewhere(start)
    run = jax.jit(loss)
    before = float(case.on_mesh(lambda: run(start, key)))
    for path in dead:
        paths = iter([one for one, _ in _named(start)])
        other = jax.tree.map(lambda old, new, paths=paths, path=path: new if next(paths) == path else old, start, moved)
        after = float(case.on_mesh(functools.partial(run, other, key)))
        if reads[path] and abs(after - before) <= 1e-5 * abs(before):
            yield path


def _losses(sums: Sums) -> list[str]:
    return [name for name, entry in sums.items() if name.startswith(LOSS) and isinstance(entry, Sum)]


def _additivity(case: ObjectiveCase, key: Array | None) -> tuple[str, float, bool]:
    """Returns the entry whose parts differ most from the whole, by how much, and whether it is its count."""
    whole, first, second = (case.sums(batch, key) for batch in (case.both, *case.halves))
    worst: tuple[float, str, bool] = (0.0, "", False)
    for name, entry in whole.items():
        parts = (entry, first[name], second[name])
        if isinstance(entry, Max):
            totals = [np.asarray(one.maximum, np.float64) for one in parts]  # type: ignore[union-attr]
            found = _apart(totals[0], np.maximum(totals[1], totals[2]), totals)
            worst = max(worst, (found, name, False))
            continue
        counted = [np.asarray(one.count, np.float64) for one in parts]  # type: ignore[union-attr]
        totals = [np.asarray(one.total, np.float64) for one in parts]  # type: ignore[union-attr]
        found = _apart(totals[0], totals[1] + totals[2], [*totals, SMALL * counted[0]])
        worst = max(worst, (found, name, False), (_apart(counted[0], counted[1] + counted[2], counted), name, True))
    return worst[1], worst[0], worst[2]


def _apart(whole: np.ndarray, parts: np.ndarray, all_of: Sequence[np.ndarray]) -> float:
    """Returns the largest difference, over the largest entry of any of them; infinite where only one is not finite."""
    same = (whole == parts) | (np.isnan(whole) & np.isnan(parts))
    if same.all():
        return 0.0
    scale = max(float(np.max(np.abs(x), where=np.isfinite(x), initial=0)) for x in all_of)
    gap = np.where(same, 0.0, np.abs(np.where(same, 0.0, whole) - np.where(same, 0.0, parts)))
    found = float(np.max(gap))
    return found / (scale or 1.0) if np.isfinite(found) else float("inf")
