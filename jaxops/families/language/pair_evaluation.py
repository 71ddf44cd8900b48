"""The evaluation of a policy on held-out pairs: log-probabilities of both texts under policy and reference."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxops.core.interrupt import Interrupted
from jaxops.core.state import Params
from jaxops.data.preferences.pairs import PairBatches, Pairs
from jaxops.evaluate.implicit_rewards import measure
from jaxops.evaluate.judged_pairs import judged_of
from jaxops.evaluate.preferences import reliability
from jaxops.objectives.direct_preference import Dpo, Ipo, logprobs_of_pairs
from jaxops.objectives.language import LanguageModel
from jaxops.run.passes import Passes
from jaxops.run.task import Evaluate, Measured, Poll, Task
from jaxops.run.weights import Weights

Logprobs = Callable[[Params, Any], Float[Array, "batch two models"]]


@dataclasses.dataclass(frozen=True)
class PairEvaluation:
    """The evaluation on held-out pairs.

    Attributes:
      pairs: the pairs.
      logprobs: (params, batch) -> log-probability of each text of a batch under the policy and under the reference.
      objective: the loss that is measured; None where it is a user's own.
    """

    pairs: Pairs
    logprobs: Logprobs
    objective: Dpo | Ipo | None
    parts: tuple[str, ...] = ("valid",)

    def on(self, task: Task, mesh: Mesh) -> Evaluate:
        """Returns the evaluation on this mesh. It is compiled once, at the first batch."""
        passes = Passes.of(task.config, task.tables, mesh, task.config.evaluate.batch)
        wanted, judged = dict.fromkeys(task.config.evaluate.metrics), judged_of(self.pairs)
        tokens = self.pairs.texts.targets[self.pairs.sides].astype(np.float64)
        beta = 1.0 if self.objective is None else self.objective.beta

        def evaluate(weights: Weights, part: str, step: int, poll: Poll) -> Measured:
            del part, step
            found = []
            for logprobs in passes.over("pairs", self.logprobs, weights, PairBatches(self.pairs, passes.size)):
                if poll():
                    raise Interrupted
                found.append(np.asarray(jax.device_get(logprobs)))
            both = np.concatenate(found)[: len(self.pairs)].astype(np.float64)
            both = np.where(judged.swapped[:, None, None], both[:, ::-1], both)
            policy, reference = both[..., 0], both[..., 1]
            losses = None if self.objective is None else _losses(self.objective, policy - reference, judged, tokens)
            values = measure(judged, policy, reference, tokens, beta=beta, losses=losses)
            kept = {name: values[name] for name in wanted}
            kept |= {name: value for name, value in values.items() if name.partition("[")[0] in wanted and "[" in name}
            difference = beta * (policy - reference)[:, 0] - beta * (policy - reference)[:, 1]
            return Measured(kept, {"reliability": reliability(difference, judged.label, judged.weight)})

        return evaluate


def _losses(objective: Dpo | Ipo, ratios: np.ndarray, judged: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns the loss of each pair, computed on this host alone."""
    given = (jnp.asarray(np.asarray(x, np.float32)) for x in (ratios, judged.label, tokens))
    return np.asarray(jax.device_get(objective.loss(*given)))


def logprobs_of_both(
    model: LanguageModel,
    policy: Callable[[Params], Params],
    reference: Callable[[Params], Params],
    *,
    chunk: int | None = None,
) -> Logprobs:
    """Returns the function from all parameters and a batch of pairs to each text's logprob under policy and reference.

    Args:
      model: policy and reference are two sets of its parameters.
      policy: picks the policy's out of all parameters.
      reference: picks the reference's.
      chunk: see `token_logprobs`.
    """

    def logprobs(params: Params, batch: Any) -> Float[Array, "batch two models"]:
        found = [logprobs_of_pairs(model, pick(params), batch, chunk=chunk) for pick in (policy, reference)]
        return jnp.stack(found, axis=-1)

    return logprobs
