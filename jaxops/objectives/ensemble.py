"""The loss of an ensemble of reward heads: each head learns from pairs weighted anew, so that they come to differ.

Tested in tests/objectives/test_ensemble.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxops.core.sums import Sums, merge
from jaxops.objectives.preference import Batch, Objective, TextScorer, side_by_side

BOOTSTRAP = 20_140_601
"""The seed of the weights: an example keeps its weights in all epochs and all runs."""


@runtime_checkable
class ScoreHeads(Protocol):
    """A reward model with several heads over one trunk."""

    @property
    def ensemble(self) -> int:
        """The number of heads."""
        ...

    def scores(
        self,
        params: PyTree,
        tokens: Int[Array, "batch length"],
        segment: Int[Array, "batch length"],
        position: Int[Array, "batch length"],
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch heads"]: ...


@dataclasses.dataclass(frozen=True)
class _Scored:
    """A reward model whose scores of a batch are known already."""

    scores: Float[Array, " rows"]

    def score(self, params: Any, tokens: Any, segment: Any, position: Any, keys: Any = None) -> Float[Array, " rows"]:
        return self.scores


BatchScores = Callable[[PyTree, Batch], Float[Array, "rows heads"]]
"""Given parameters and a batch of pairs, each head's score of each text, the texts of a pair one after the other."""


def each_head(
    model: ScoreHeads, build: Callable[[TextScorer], Objective], scores_of_batch: BatchScores | None = None
) -> Objective:
    """Returns the mean of the objective over all heads, each with the pairs weighted by `bootstrap_weights`.

    Totals and counts of the heads are added, so a mean over heads is one over heads and pairs. A single head has the
    plain weights.

    Args:
      model: the reward model.
      build: the objective of one head, such as `BradleyTerry().build`.
      scores_of_batch: the scores, where the model need not read the texts for them; None has it read them.
    """

    def objective(params: PyTree, batch: Batch, key: Key[Array, ""] | None) -> Sums:
        if scores_of_batch is None:
            rows, keys = side_by_side(batch, key)
            scores = model.scores(params, rows["tokens"], rows["segment"], rows["position"], keys)
        else:
            scores = scores_of_batch(params, batch)
        weights = bootstrap_weights(batch["id"], model.ensemble) if model.ensemble > 1 else None
        found: Sums | None = None
        for head in range(model.ensemble):
            own = batch if weights is None else {**batch, "weight": batch["weight"] * weights[:, head]}
            sums = build(_Scored(scores[:, head]))(params, own, None)
            found = sums if found is None else merge(found, sums)
        assert found is not None
        return found

    return objective


def bootstrap_weights(ids: Int[Array, " batch"], heads: int) -> Float[Array, "batch heads"]:
    """Returns the weight of each example for each head, exponential with mean 1 (the Bayesian bootstrap of Rubin 1981).

    Args:
      ids: ids of examples, of which nothing else is read.
      heads: the number of heads.
    """
    base = jax.random.key(BOOTSTRAP)
    draw = lambda one: jax.random.exponential(jax.random.fold_in(base, one), (heads,), jnp.float32)
    return jax.vmap(draw)(ids)
