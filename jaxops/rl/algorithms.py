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
from jaxops.objectives.policy import Aggregation, aggregated, clipped_surrogate, clipped_value_loss, kl_estimate
from jaxops.rl.advantages import (
    Baseline,
    Variance,
    best_of_group,
    generalised_advantages,
    group_advantages,
    rewards_of_tokens,
    whitened,
)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gae:
    """Generalised advantages: the discount of a token, and how far they look ahead."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    lambda_: Annotated[float, Field(ge=0, le=1)] = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ppo(Algorithm):
    """Proximal policy optimisation with learnt values (Schulman et al. 2017; for text, Ziegler et al. 2019).

    Attributes:
      group: number of completions of a prompt.
      gae: how advantages are made of rewards and values.
      value_clip: how far a value's move counts; null compares values as they are.
      value_weight: weight of the values' loss.
      whiten: the variance by which advantages are whitened, `biased` or `unbiased`; `none` leaves them.
      whiten_rewards: the same for rewards of tokens, whose mean is kept.
      cut: what the end of a completion is that max_tokens cut: `terminal`, or `bootstrap` from the value there.
      critic_warmup: number of first steps whose loss is that of the values alone. With a value that has a trunk of its
        own the policy then stays as it is, but for weight decay; a value that is a head trains the policy's trunk.
    """

    has_values: ClassVar[bool] = True

    kind: Literal["ppo"] = "ppo"
    epochs: Positive = 4
    minibatches: Positive = 4
    group: Positive = 1
    gae: Gae = Gae()
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    value_weight: Annotated[float, Field(ge=0)] = 0.1
    whiten: Variance | Literal["none"] = "biased"
    whiten_rewards: Variance | Literal["none"] = "none"
    cut: Literal["terminal", "bootstrap"] = "terminal"
    critic_warmup: Annotated[int, Field(ge=0)] = 0

    @property
    def completions(self) -> int:
        """The number of completions of a prompt."""
        return self.group

    @property
    def values_first(self) -> int:
        """The number of first steps that train the values alone."""
        return self.critic_warmup

    def learnt(self, rollout: Rollout) -> Learnt:
        """Returns generalised advantages over rewards of tokens, with the KL in them where it is in the reward."""
        assert rollout.values is not None
        mask, values = rollout.mask, rollout.values[:, :-1]
        kl = None
        if self.penalises and self.kl.in_ == "reward":
            assert rollout.reference is not None
            kl = kl_estimate(rollout.old, rollout.reference, self.kl.estimator, mask)
        rewards = rewards_of_tokens(jnp.where(rollout.kept > 0, rollout.scores, 0.0), mask, kl, rollout.coefficient)
        if self.whiten_rewards != "none":
            rewards = whitened(rewards, mask, shift=False, variance=self.whiten_rewards)
        after = None
        if self.cut == "bootstrap":
            at_end = jnp.take_along_axis(rollout.values, rollout.lengths[:, None], axis=1)[:, 0]
            after = jnp.where(rollout.ended, 0.0, at_end)
        found = generalised_advantages(
            rewards, values, mask, gamma=self.gae.gamma, lam=self.gae.lambda_, bootstrap=after
        )
        advantages = found.advantages
        if self.whiten != "none":
            advantages = whitened(advantages, mask, variance=self.whiten)
        spreads = jnp.stack([_spread(x, mask) for x in (found.returns, found.returns - values)])
        sums: Sums = {
            "explained_variance": Sum(spreads, jnp.broadcast_to(jnp.sum(mask), (2,)), _explained),
            "value": Sum.of(values, mask),
            "return": Sum.of(found.returns, mask),
        }
        return Learnt({"advantages": advantages, "returns": found.returns, "values": values}, sums)

    def _value_terms(
        self, model: PolicyModel, params: Any, batch: Mapping[str, Array], hidden: Float[Array, "batch longest dim"]
    ) -> Sums:
        values = model.values(params, batch, hidden)
        loss = clipped_value_loss(values, batch["values"], batch["returns"], self.value_clip)
        return {"loss/value": Sum.of(self.value_weight * loss, batch["mask"])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo(Algorithm):
    """Algorithms that compare the completions of a prompt with each other, and need no values.

    `grpo` takes scores less the group's mean, over its deviation, and the mean over completions of each one's mean
    (Shao et al. 2024). `dr_grpo` divides by no deviation and by no length, which are biases (Liu et al. 2025).
    `dapo` is `grpo` with a higher upper clip, means over all tokens, and prompts drawn again until groups differ (Yu et
    al. 2025). `rloo` takes scores less the mean of the other completions (Ahmadian et al. 2024). The loss of `dr_grpo`
    and `rloo` is the sum over tokens, divided by the longest possible number of tokens, whatever a completion's length.

    Attributes:
      group: number of completions of a prompt.
      kl: the penalty; by default there is none. As a loss k2 has the gradient of the KL, and k3 that of GRPO's paper.
      eps: is added to the deviation of a group.
      redraws: of `dapo`, how often prompts are drawn again at most, in the place of those whose completions have one
        score.
    """

    kind: Literal["grpo", "dr_grpo", "dapo", "rloo"] = "grpo"
    group: Annotated[int, Field(ge=2)] = 8
    kl: Kl = Kl(in_="loss", estimator="k3", coef=0.0)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    redraws: Annotated[int, Field(ge=0)] = 3

    @property
    def completions(self) -> int:
        """The number of completions of a prompt."""
        return self.group

    @property
    def over(self) -> Aggregation:
        """The entries that the mean of the loss is over."""
        return {"grpo": "completions", "dapo": "tokens"}.get(self.kind, "constant")  # type: ignore[return-value]

    @property
    def high(self) -> float:
        """How far above 1 a ratio counts."""
        return 0.28 if self.kind == "dapo" and self.clip_high is None else super().high

    @property
    def draws(self) -> int:
        """How often a step draws prompts again at most."""
        return self.redraws if self.kind == "dapo" else 0

    def learnt(self, rollout: Rollout) -> Learnt:
        """Returns each completion's advantage over its group, the same at all of its tokens."""
        scores = self._penalised(rollout)
        baseline: Baseline = "others" if self.kind == "rloo" else "mean"
        scaled = self.kind in ("grpo", "dapo")
        found = group_advantages(
            scores, self.group, weight=rollout.kept, baseline=baseline, scaled=scaled, eps=self.eps
        )
        advantages = found.advantages[:, None] * rollout.mask
        return Learnt({"advantages": advantages}, {"flat_groups": Sum.of(found.flat)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN(Algorithm):
    """Rejection sampling: the best completions of each prompt are learnt as if they were given (Touvron et al. 2023).

    The loss is the mean of -log p over their tokens. Nothing is learnt from a prompt whose completions have one score.

    Attributes:
      group: number of completions of a prompt.
      keep: how many of them are best.
      kl: the penalty; by default there is none.
    """

    kind: Literal["best_of_n"] = "best_of_n"
    group: Annotated[int, Field(ge=2)] = 8
    keep: Positive = 1
    kl: Kl = Kl(in_="loss", estimator="k3", coef=0.0)

    @property
    def completions(self) -> int:
        """The number of completions of a prompt."""
        return self.group

    def problems(self) -> list[tuple[str, str]]:
        """Returns the errors in these values, as (dotted path, message)."""
        found = []
        if self.keep >= self.group:
            found.append(("keep", f"{self.keep} of a group of {self.group} are all of it: nothing would be rejected"))
        for name in ("clip", "clip_high", "dual_clip"):
            if getattr(self, name) != getattr(Algorithm, name):
                found.append((name, "best_of_n has no ratio of probabilities that could be bounded: leave it out"))
        return found

    def learnt(self, rollout: Rollout) -> Learnt:
        """Returns 1 at the tokens of the best completions of each prompt, and 0 at others."""
        found = best_of_group(self._penalised(rollout), self.group, keep=self.keep, weight=rollout.kept)
        sums: Sums = {"flat_groups": Sum.of(found.flat), "reward_best": Sum.of(rollout.scores, found.advantages)}
        return Learnt({"advantages": found.advantages[:, None] * rollout.mask}, sums)

    def _policy_terms(
        self, logprobs: Float[Array, "batch longest"], batch: Mapping[str, Array], mean: Callable[[Array], Sum]
    ) -> Sums:
        del mean  # over the tokens of the best completions alone
        return {"loss/policy": Sum.of(-logprobs, batch["advantages"])}


AnyAlgorithm = Ppo | Grpo | BestOfN


def importance(algorithm: Algorithm, old: Float[Array, "b t"], sampled: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Returns the weight of each token for the difference between training's probabilities and those of sampling."""
    if algorithm.correction == "none":
        return jnp.ones_like(old)
    ratio, cap = jnp.exp(jnp.clip(old - sampled, -20.0, 20.0)), algorithm.correction_cap
    if algorithm.correction == "truncated":
        return jnp.minimum(ratio, cap)
    return jnp.where((ratio <= cap) & (ratio >= 1 / cap), ratio, 0.0)


def _spread(values: Float[Array, "b t"], mask: Float[Array, "b t"]) -> Float[Array, ""]:
    """Returns the sum of squares of differences from the mean; exactly 0 where all values of the mask are one."""
    mean = jnp.sum(jnp.where(mask > 0, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1.0)
    squares = jnp.sum(jnp.where(mask > 0, (values - mean) ** 2, 0.0))
    largest = jnp.max(jnp.where(mask > 0, values, -jnp.inf))
    return jnp.where(largest > jnp.min(jnp.where(mask > 0, values, jnp.inf)), squares, 0.0)


def _explained(variances: Any) -> float:
    """Returns 1 - Var(returns - values) / Var(returns); over several steps both are the variance within a step."""
    returns, left = (float(x) for x in variances)
    return 1 - left / returns if returns > 0 else float("nan")
