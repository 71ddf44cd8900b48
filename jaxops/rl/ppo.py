"""Proximal policy optimisation: advantages out of learnt values. Tested in tests/rl/test_algorithms.py."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from jaxops.core.sums import Sum, Sums
from jaxops.models.policy import PolicyModel
from jaxops.objectives.policy import clipped_value_loss, kl_estimate
from jaxops.rl.advantages import Variance, generalised_advantages, rewards_of_tokens, whitened
from jaxops.rl.algorithms import Algorithm, Learnt, Positive, Rollout


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
