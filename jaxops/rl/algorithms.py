"""The algorithms of policy optimisation, each a choice of advantages, of a loss and of what its mean is over.

All of them run in the same step (rl/step.py) and share one objective: PPO's clipped surrogate, with terms for values,
for the KL and for the entropy where the algorithm has them. Checked in tests/rl/test_algorithms.py; that each finds
the optimum that it promises is shown in tests/rl/test_exact_optimum.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from jaxops.config.part import Part
from jaxops.core.accumulate import Objective
from jaxops.core.sums import Max, Sum, Sums
from jaxops.models.policy import PolicyModel
from jaxops.objectives.policy import Aggregation, aggregated, clipped_surrogate, kl_estimate
from jaxops.rl.kl import Kl

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """The arrays that advantages are computed from; [batch, longest] but for the last ones, which are [batch].

    Attributes:
      mask: 1 at tokens of completions that are learnt from.
      old: log-probabilities under the policy, as training computes them.
      reference: log-probabilities under the reference; None without one.
      values: the value of the state before each token, with one more column for the state after; None without values.
      scores: the score of each completion.
      kept: 1 for completions that have a score, 0 for those that were dropped.
      ended: whether the policy ended the completion itself.
      lengths: the number of tokens of each completion.
      coefficient: the coefficient of the KL, a scalar.
    """

    mask: Float[Array, "batch longest"]
    old: Float[Array, "batch longest"]
    reference: Float[Array, "batch longest"] | None
    values: Float[Array, "batch longest_and_one"] | None
    scores: Float[Array, " batch"]
    kept: Float[Array, " batch"]
    ended: Array
    lengths: Array
    coefficient: Float[Array, ""]


class Learnt(NamedTuple):
    """The outcome of computing advantages: what the update reads of them, and figures for people.

    Attributes:
      batch: arrays by name, a row for each completion.
      sums: metrics.
    """

    batch: dict[str, Array]
    sums: Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm(Part):
    """The fields that all algorithms have.

    Attributes:
      epochs: how often an update step goes through the completions.
      minibatches: the number of updates of an epoch.
      clip: how far below 1 a ratio of probabilities counts, and above it unless `clip_high` says otherwise.
      clip_high: how far above 1 a ratio counts.
      dual_clip: bound of the loss at negative advantages; null has none.
      entropy: weight of the entropy that is added to what is maximised.
      kl: the penalty on leaving the reference.
      target_kl: updates of a step end once the policy has moved this far from the one that sampled, in nats a token;
        null never ends them.
      score_clip: scores are bounded by this on both sides; null leaves them.
      score_scale: `running` divides scores by the deviation of all scores so far, after their mean is taken off.
      correction: the weight of each token for the difference between sampling and training, probability over
        probability: `truncated` at `correction_cap`, `masked` to 0 beyond it, or `none`.
      correction_cap: bound of that weight; `masked` has its inverse as a lower bound too.
    """

    has_values: ClassVar[bool] = False

    epochs: Positive = 1
    minibatches: Positive = 1
    clip: Share = 0.2
    clip_high: Annotated[float, Field(gt=0)] | None = None
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    entropy: Annotated[float, Field(ge=0)] = 0.0
    kl: Kl = Kl()
    target_kl: Annotated[float, Field(gt=0)] | None = None
    score_clip: Annotated[float, Field(gt=0)] | None = None
    score_scale: Literal["none", "running"] = "none"
    correction: Literal["none", "truncated", "masked"] = "none"
    correction_cap: Annotated[float, Field(gt=1)] = 2.0

    @property
    def completions(self) -> int:
        """The number of completions of a prompt."""
        raise NotImplementedError

    @property
    def over(self) -> Aggregation:
        """The entries that the mean of the loss is over."""
        return "tokens"

    @property
    def high(self) -> float:
        """How far above 1 a ratio counts."""
        return self.clip if self.clip_high is None else self.clip_high

    @property
    def draws(self) -> int:
        """How often a step draws prompts again at most."""
        return 0

    @property
    def values_first(self) -> int:
        """The number of first steps that train the values alone."""
        return 0

    @property
    def penalises(self) -> bool:
        """Whether there is a penalty on the KL, and so a reference."""
        return self.kl.coef > 0 or self.kl.target is not None

    def learnt(self, rollout: Rollout) -> Learnt:
        """Returns advantages, with values' targets where there are any."""
        raise NotImplementedError

    def objective(self, model: PolicyModel, temperature: float, longest: int) -> Objective:
        """Returns the objective of an update on a minibatch of completions.

        Args:
          model: the models.
          temperature: the temperature that completions are sampled at.
          longest: the number of tokens of the longest completion that is possible.
        """

        def objective(params: Any, batch: Mapping[str, Array], key: Array | None) -> Sums:
            del key  # no dropout: ratios would be of two different models
            hidden = model.hidden(params, batch)
            found = model.scores(params, batch, temperature, hidden)
            mask, mean = batch["mask"], lambda x: aggregated(x, batch["mask"], self.over, longest)
            on = batch["policy_on"][:, None]
            sums = self._policy_terms(found.logprobs, batch, lambda x: mean(x * on))
            if self.penalises and self.kl.in_ == "loss":
                kl = kl_estimate(found.logprobs, batch["reference"], self.kl.estimator, mask)
                sums["loss/kl"] = mean(batch["coefficient"][:, None] * kl * on)
            if self.entropy:
                sums["loss/entropy"] = mean(-self.entropy * found.entropy * on)
            sums |= self._value_terms(model, params, batch, hidden)
            moved = kl_estimate(batch["old"], found.logprobs, "k3", mask)
            sums["entropy"] = Sum.of(found.entropy, mask)
            sums["moved_kl"] = Sum.of(moved, mask)
            return sums

        return objective

    def _policy_terms(
        self, logprobs: Float[Array, "batch longest"], batch: Mapping[str, Array], mean: Callable[[Array], Sum]
    ) -> Sums:
        """Returns the policy's loss, here the clipped surrogate, and metrics of it.

        Args:
          logprobs: the log-probability of each token under the policy.
          batch: a minibatch of completions.
          mean: the mean of a loss of each token, as the algorithm takes it.
        """
        mask = batch["mask"]
        bounds: dict[str, Any] = {"low": self.clip, "high": self.high, "dual": self.dual_clip}
        surrogate = clipped_surrogate(logprobs, batch["old"], batch["advantages"], mask, **bounds)
        ratio = Max(jnp.max(jnp.where(mask > 0, surrogate.ratio, 0.0)))
        return {
            "loss/policy": mean(surrogate.loss),
            "clip_fraction": Sum.of(surrogate.clipped, mask),
            "ratio_max": ratio,
        }

    def _value_terms(
        self, model: PolicyModel, params: Any, batch: Mapping[str, Array], hidden: Float[Array, "batch longest dim"]
    ) -> Sums:
        return {}

    def _penalised(self, rollout: Rollout) -> Float[Array, " batch"]:
        """Returns the scores of completions, less the KL of each where that is in the reward."""
        if not self.penalises or self.kl.in_ != "reward":
            return rollout.scores
        assert rollout.reference is not None
        kl = kl_estimate(rollout.old, rollout.reference, self.kl.estimator, rollout.mask)
        return rollout.scores - rollout.coefficient * jnp.sum(kl, axis=1)


def importance(algorithm: Algorithm, old: Float[Array, "b t"], sampled: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Returns the weight of each token for the difference between training's probabilities and those of sampling."""
    if algorithm.correction == "none":
        return jnp.ones_like(old)
    ratio, cap = jnp.exp(jnp.clip(old - sampled, -20.0, 20.0)), algorithm.correction_cap
    if algorithm.correction == "truncated":
        return jnp.minimum(ratio, cap)
    return jnp.where((ratio <= cap) & (ratio >= 1 / cap), ratio, 0.0)
