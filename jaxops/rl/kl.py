"""The coefficient of the KL penalty: fixed, or adapted so that the KL of a completion comes near a target."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from jaxops.objectives.policy import Estimator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kl:
    """The penalty that keeps the policy near the reference.

    Attributes:
      in_: `reward` takes it off the reward of each token; `loss` adds it to the loss.
      estimator: k1, k2 or k3, see `objectives.policy.kl_estimate`. In the reward only k1 is right.
      coef: its coefficient, or where that is adapted the first one. With 0 and no target there is no penalty.
      target: the KL of a completion, in nats, that the coefficient is adapted towards; null keeps the coefficient.
      horizon: the number of completions after which an error of 100 % has changed the coefficient by its own size.
    """

    in_: Literal["reward", "loss"] = "reward"
    estimator: Estimator = "k1"
    coef: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    target: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    horizon: Annotated[int, Field(ge=1)] = 10_000

    def problems(self) -> list[tuple[str, str]]:
        """Returns the errors in these values, as (dotted path, message)."""
        if self.target is not None and self.coef == 0:
            text = "it is adapted towards the target by factors, and 0 stays 0; for no penalty set target: null too"
            return [("coef", text)]
        return []


def adapted(coefficient: Float[Array, ""], kl: Float[Array, ""], completions: int, config: Kl) -> Float[Array, ""]:
    """Returns the next coefficient (Ziegler et al. 2019): c (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon).

    Args:
      coefficient: the coefficient c.
      kl: the mean KL of a completion, summed over its tokens, with k1.
      completions: the number n of completions.
      config: target and horizon; without a target the coefficient stays.
    """
    if config.target is None:
        return coefficient
    error = jnp.clip(kl / config.target - 1, -0.2, 0.2)
    return coefficient * (1 + error * (completions / config.horizon))
