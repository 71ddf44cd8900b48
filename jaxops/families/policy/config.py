"""The config of policy optimisation: the common sections, and models, prompts, rewards, sampling and algorithm."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jaxops.config.types import ByPath, Factory
from jaxops.core.metric import Metric, metric_of
from jaxops.data.prompts.spec import AnyPrompts
from jaxops.models.decoder.architecture import Architecture
from jaxops.rl.algorithms import AnyAlgorithm, Ppo
from jaxops.rl.options import MOST, MOST_SLOTS, SampleOptions
from jaxops.rl.rewards.config import Reward
from jaxops.run.config import EarlyStop, Evaluate, Positive, RunConfig
from jaxops.run.pretrained.config import Pretrained

METRICS: Mapping[str, Metric] = {
    "reward": Metric("reward", "higher", "Reward"),
    "win_rate": Metric("win_rate", "higher", "Win rate over the reference"),
    "kl": Metric("kl", "neither", "KL to the reference (nats a completion)"),
    "kl_token": Metric("kl_token", "neither", "KL to the reference (nats a token)"),
    "entropy": Metric("entropy", "neither", "Entropy (nats a token)"),
    "length": Metric("length", "neither", "Length (tokens)"),
    "eos_rate": Metric("eos_rate", "neither", "Share that ended"),
    "distinct_2": Metric("distinct_2", "neither", "Distinct pairs of words"),
}
"""The metrics of a policy on held-out prompts; `reward/NAME` of each reward comes beside them."""
JUDGE = Factory(leading=3, note="a function fn(prompts, completions, references) -> list of 0 to 1", open=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueHead:
    """Values are read off the policy's own hidden states (Ziegler et al. 2019)."""

    kind: Literal["head"] = "head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueTrunk:
    """Values have a decoder of their own, which begins as `weights` (a reward model's run), or as the policy does."""

    kind: Literal["trunk"] = "trunk"
    weights: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """The size of a step: `prompts` of it, and the completions that an update differentiates at a time."""

    pack: ClassVar[bool] = False

    prompts: Positive = 32
    microbatch: Positive | Literal["auto"] = "auto"

    @property
    def global_(self) -> int:
        """The examples of one step of the loop, which are prompts."""
        return self.prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts(SampleOptions):
    """How completions are sampled to learn from; `slots` at a time, with a look for stops every `segment` tokens.

    The distribution may have a temperature, and nothing else: `top_k`, `top_p` and `min_p` leave tokens out, and a
    token that another policy would leave out has no ratio of probabilities.
    """

    slots: Annotated[int, Field(ge=1, le=MOST_SLOTS)] = 32
    segment: Annotated[int, Field(ge=1, le=MOST)] = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyEvaluate(Evaluate):
    """Answers the held-out prompts every `every` steps, and at the end with the kept parameters.

    Attributes:
      prompts: largest number of held-out prompts.
      temperature: the temperature of these answers; 0 takes the most probable tokens.
      samples: number of answers that samples.jsonl and the report show, always of the same prompts.
      judge: a function that compares each answer with the reference's, for `win_rate`.
    """

    metrics: tuple[str, ...] = ("reward", "kl", "length", "eos_rate", "distinct_2")
    prompts: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 1.0
    samples: Annotated[int, Field(ge=0)] = 8
    judge: Annotated[ByPath, JUDGE] | None = None
    stop: EarlyStop | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(RunConfig):
    """A run of policy optimisation.

    `model` is the policy: `{weights: ...}` of a language model, trained whole or by adapters, or an architecture with
    fresh parameters. The reference is what it began as. `rewards` judge its completions, and `algorithm` learns from
    them: `ppo`, `grpo`, `dr_grpo`, `dapo` or `rloo`.
    """

    size_of_batch: ClassVar[str] = "batch.prompts"

    task: str = "policy"
    model: Pretrained | Architecture
    tokenizer: str | None = None
    value: ValueHead | ValueTrunk = ValueHead()
    data: AnyPrompts
    rewards: tuple[Reward, ...]
    sample: Rollouts = Rollouts()
    algorithm: AnyAlgorithm = Ppo()
    batch: PolicyBatch = PolicyBatch()  # type: ignore[assignment]
    evaluate: PolicyEvaluate = PolicyEvaluate()

    def metric(self, name: str) -> Metric:
        """Returns the metric of this name.

        Raises:
          UserError: there is no such metric; the message names the nearest right one.
        """
        known = {f"reward/{reward.label}": Metric(f"reward/{reward.label}", "higher") for reward in self.rewards}
        return metric_of({**METRICS, **known}, name)

    @property
    def completions(self) -> int:
        """The number of completions of a step."""
        return self.batch.prompts * self.algorithm.completions

    def problems(self) -> list[tuple[str, str]]:
        """Returns (dotted path, message) of everything that cannot work on any machine."""
        found = super().problems()
        longest = self.data.max_tokens + self.sample.max_tokens
        if isinstance(self.model, Architecture):
            if self.tokenizer is None:
                found.append(("tokenizer", "a model with fresh parameters has none: `bytes`, or a folder's path"))
            if longest > self.model.length:
                text = f"with data.max_tokens {longest} tokens, but the model reads {self.model.length} (model.length)"
                found.append(("sample.max_tokens", text))
        for name in ("top_k", "top_p", "min_p"):
            if getattr(self.sample, name) != getattr(Rollouts(), name):
                text = (
                    "leaves tokens out: one that the next policy would leave out has no ratio of probabilities, so"
                    " completions are learnt from at a temperature alone (`jaxops sample` takes it)"
                )
                found.append((f"sample.{name}", text))
        if self.sample.greedy:
            found.append(("sample.temperature", "0 always writes the same: nothing could be learnt from comparing"))
        if not self.rewards:
            found.append(("rewards", "nothing judges the completions: name a function, a run or a penalty"))
        for label, count in Counter(reward.label for reward in self.rewards).items():
            if count > 1:
                found.append(("rewards", f"{count} of them are called {label!r}: give them a `name` each"))
        held_out = self.data.valid is not None
        if not held_out and (self.evaluate.stop is not None or self.checkpoint.best is not None):
            found.append(("data.valid", "nothing is held out, but evaluate.stop or checkpoint.best judge by it"))
        if "win_rate" in self.evaluate.metrics and self.evaluate.judge is None:
            found.append(("evaluate.metrics", "win_rate needs evaluate.judge, which compares two answers"))
        return found + self.model.problems_in(self) + self.algorithm.problems_in(self)

    @property
    def keeps_reference(self) -> bool:
        """Whether the model that the policy began as is kept: for the penalty, or because it is the adapters' base."""
        lora = self.model.lora if isinstance(self.model, Pretrained) else None
        return self.algorithm.penalises or lora is not None

    def microbatch_problems(self) -> list[tuple[str, str]]:
        """Returns what is wrong with the size of a microbatch, which divides the completions of an update."""
        updates = self.algorithm.minibatches
        if self.completions % updates:
            text = f"{updates} do not divide the {self.completions} completions of a step"
            return [("algorithm.minibatches", f"{text} (batch.prompts x algorithm.group)")]
        rows, size = self.completions // updates, self.batch.microbatch
        if isinstance(size, int) and rows % size:
            return [("batch.microbatch", f"{size} does not divide the {rows} completions of an update")]
        return []

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """Returns (dotted path, message) of everything that cannot work on a mesh of these sizes."""
        found = super().mesh_problems(sizes) + self.model.mesh_problems(sizes)
        if sizes["sequence"] > 1:
            found.append(("mesh.sequence", "a decoder has no sequence parallelism yet: leave it at 1"))
        return found
