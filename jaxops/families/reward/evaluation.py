"""The evaluation of a reward model: the scores of all held-out pairs, brought to the host and judged there."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxops.core.interrupt import Interrupted
from jaxops.core.state import Params
from jaxops.data.preferences.pairs import PairBatches, Pairs
from jaxops.evaluate.judged_pairs import judged_of
from jaxops.evaluate.preferences import measure, reliability
from jaxops.models.reward import RewardModel
from jaxops.objectives.preference import side_by_side
from jaxops.run.passes import Passes
from jaxops.run.task import Evaluate, Measured, Poll, Task
from jaxops.run.weights import Weights

Scores = Callable[[Params, Any], Float[Array, "batch two heads"]]


@dataclasses.dataclass(frozen=True)
class RewardEvaluation:
    """The evaluation on held-out pairs.

    Attributes:
      pairs: the pairs.
      scores: (params, batch) -> each head's score of each text of a batch.
    """

    pairs: Pairs
    scores: Scores
    parts: tuple[str, ...] = ("valid",)

    def on(self, task: Task, mesh: Mesh) -> Evaluate:
        """Returns the evaluation on this mesh. It is compiled once, at the first batch."""
        passes = Passes.of(task.config, task.tables, mesh, task.config.evaluate.batch)
        wanted = dict.fromkeys(task.config.evaluate.metrics)
        judged = judged_of(self.pairs)

        def evaluate(weights: Weights, part: str, step: int, poll: Poll) -> Measured:
            del part, step
            found = []
            for scores in passes.over("pairs", self.scores, weights, PairBatches(self.pairs, passes.size)):
                if poll():
                    raise Interrupted
                found.append(np.asarray(jax.device_get(scores)))
            heads = np.concatenate(found)[: len(self.pairs)]
            heads = np.where(judged.swapped[:, None, None], heads[:, ::-1], heads).astype(np.float64)
            values = measure(judged, heads)
            kept = {name: values[name] for name in wanted}
            kept |= {name: value for name, value in values.items() if name.partition("[")[0] in wanted and "[" in name}
            scores = heads.mean(axis=2)
            return Measured(
                kept, {"reliability": reliability(scores[:, 0] - scores[:, 1], judged.label, judged.weight)}
            )

        return evaluate


def scores_of_pairs(reward: RewardModel) -> Scores:
    """Returns the function from parameters and a batch of pairs to each head's score of each text."""

    def scores(params: Params, batch: Any) -> Float[Array, "batch two heads"]:
        rows, _ = side_by_side(batch, None)
        found = reward.scores(params, rows["tokens"], rows["segment"], rows["position"])
        return found.reshape(*batch["tokens"].shape[:2], reward.ensemble)

    return scores


def scores_of_features(reward: RewardModel) -> Scores:
    """Returns the same function for batches that hold the features of their texts."""

    def scores(params: Params, batch: Any) -> Float[Array, "batch two heads"]:
        features = batch["features"]
        found = reward.heads(params, features.reshape(-1, features.shape[-1]))
        return found.reshape(*features.shape[:2], reward.ensemble)

    return scores
