"""Algorithms that compare the completions of a prompt with each other. Tested in tests/rl/test_algorithms.py."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from jaxtyping import Array, Float
from pydantic import Field

from jaxops.core.sums import Sum, Sums
from jaxops.objectives.policy import Aggregation
from jaxops.rl.advantages import Baseline, best_of_group, group_advantages
from jaxops.rl.algorithms import Algorithm, Learnt, Positive, Rollout
from jaxops.rl.kl import Kl


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
