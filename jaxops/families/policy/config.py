"""The config of policy optimisation: the common sections, and models, prompts, rewards, sampling and algorithm."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from jaxops.config.part import Part
from jaxops.config.types import ByPath, Factory
from jaxops.core.mesh import BATCH_AXES
from jaxops.core.metric import Metric, metric_of
from jaxops.data.prompts.spec import AnyPrompts
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.lora import LoraConfig
from jaxops.rl.groups import BestOfN, Grpo
from jaxops.rl.options import HOTTEST, MOST, MOST_SLOTS, TINIEST, SampleOptions
from jaxops.rl.ppo import Ppo
from jaxops.rl.ptx import Ptx
from jaxops.rl.rewards.config import Reward, further_metrics, reward_problems
from jaxops.rl.watch import Watching
from jaxops.run.config import MAY_CHANGE_ON_RESUME, EarlyStop, Evaluate, Positive, RunConfig
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
"""The metrics of a policy on held-out prompts; `reward/NAME` of each reward, and what else it measures, come beside."""
JUDGE = Factory(leading=3, note="a function fn(prompts, completions, references) -> list of 0 to 1", open=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshDecoder(Part):
    """A small decoder with fresh parameters, to try rewards on; what is trained for real begins with `weights`."""

    kind: Literal["decoder"] = "decoder"
    dim: Positive = 64
    layers: Positive = 2
    heads: Positive = 2
    hidden: Positive | None = None
    length: Positive = 128

    @property
    def architecture(self) -> Architecture:
        """The whole architecture."""
        return Architecture(dim=self.dim, layers=self.layers, heads=self.heads, hidden=self.hidden, length=self.length)

    def problems(self) -> list[tuple[str, str]]:
        """Returns the errors in these values, as (dotted path, message)."""
        return self.architecture.problems()

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """Returns everything that does not go on a mesh of these sizes, as (dotted path, message)."""
        return self.architecture.mesh_problems(sizes)


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


_LEFT_OUT = (
    "it leaves tokens out, and one that the next policy would leave out has no ratio of probabilities, so completions"
    " are learnt from at a temperature alone (`jaxops sample` takes it)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts(Part):
    """How completions are sampled to learn from: at a temperature, and from all tokens.

    Attributes:
      max_tokens: largest number of tokens that are sampled, the end token included.
      temperature: divides the logits, of sampling and of what is learnt.
      stop: texts that end a completion wherever one appears, over the borders of tokens too.
      slots: number of completions that are decoded at a time.
      segment: number of tokens between two looks for stops.
    """

    lacks: ClassVar[Mapping[str, str]] = dict.fromkeys(("top_k", "top_p", "min_p"), _LEFT_OUT)

    max_tokens: Annotated[int, Field(ge=1, le=MOST)] = 128
    temperature: Annotated[float, Field(ge=TINIEST, le=HOTTEST, allow_inf_nan=False)] = 1.0
    stop: tuple[str, ...] = ()
    slots: Annotated[int, Field(ge=1, le=MOST_SLOTS)] = 32
    segment: Annotated[int, Field(ge=1, le=MOST)] = 16

    def options(self, temperature: float | None = None) -> SampleOptions:
        """Returns the options of sampling, at another temperature where one is given."""
        at = self.temperature if temperature is None else temperature
        return SampleOptions(max_tokens=self.max_tokens, temperature=at, stop=self.stop)


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
    temperature: Annotated[float, Field(ge=0, le=HOTTEST, allow_inf_nan=False)] = 1.0
    samples: Annotated[int, Field(ge=0)] = 8
    judge: Annotated[ByPath, JUDGE] | None = None
    stop: EarlyStop | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(RunConfig):
    """A run of policy optimisation.

    `model` is the policy: a language model's weights, trained whole or by adapters, or a fresh decoder. The reference
    is what it began as, or the language model at `reference`. `rewards` judge its completions, `algorithm` learns from
    them: `ppo`, `grpo`, `dr_grpo`, `dapo`, `rloo` or `best_of_n`. `ptx` mixes the loss on a text of one's own into
    every update. `watch` raises alarms.
    """

    size_of_batch: ClassVar[str] = "batch.prompts"
    may_change_on_resume: ClassVar[tuple[str, ...]] = (*MAY_CHANGE_ON_RESUME, "watch")

    task: str = "policy"
    model: Pretrained | FreshDecoder
    tokenizer: str | None = None
    value: ValueHead | ValueTrunk = ValueHead()
    reference: str | None = None
    data: AnyPrompts
    rewards: tuple[Reward, ...]
    sample: Rollouts = Rollouts()
    algorithm: Ppo | Grpo | BestOfN = Ppo()
    ptx: Ptx | None = None
    watch: Watching = Watching()
    batch: PolicyBatch = PolicyBatch()  # type: ignore[assignment]
    evaluate: PolicyEvaluate = PolicyEvaluate()

    def metric(self, name: str) -> Metric:
        """Returns the metric of this name.

        Raises:
          UserError: there is no such metric; the message names the nearest right one.
        """
        known = {f"reward/{reward.label}": Metric(f"reward/{reward.label}", "higher") for reward in self.rewards}
        further = [f"reward/{name}/{one}" for name, names in further_metrics(self.rewards).items() for one in names]
        known |= {name: Metric(name, "neither") for name in further}
        return metric_of({**METRICS, **known}, name)

    @property
    def completions(self) -> int:
        """The number of completions of a step."""
        return self.batch.prompts * self.algorithm.completions

    def problems(self) -> list[tuple[str, str]]:
        """Returns (dotted path, message) of everything that cannot work on any machine."""
        found = super().problems()
        if isinstance(self.model, FreshDecoder):
            longest = self.data.max_tokens + self.sample.max_tokens
            if self.tokenizer is None:
                found.append(("tokenizer", "a model with fresh parameters has none: `bytes`, or a folder's path"))
            if longest > self.model.length:
                text = f"with data.max_tokens {longest} tokens, but the model reads {self.model.length} (model.length)"
                found.append(("sample.max_tokens", text))
            if self.ptx is not None and self.ptx.data.length > self.model.length:
                text = f"{self.ptx.data.length} tokens in a row, but the model reads {self.model.length} (model.length)"
                found.append(("ptx.data.length", text))
        found += reward_problems(self.rewards)
        if self.reference is not None and self.adapters is not None:
            found.append(("reference", "adapters are held against the weights under them; leave it out"))
        elif self.reference is not None and not self.keeps_reference:
            found.append(("reference", "algorithm.kl.coef is 0, so that nothing is held against it; leave it out"))
        held_out = self.data.valid is not None
        if not held_out and (self.evaluate.stop is not None or self.checkpoint.best is not None):
            found.append(("data.valid", "nothing is held out, but evaluate.stop or checkpoint.best judge by it"))
        if "win_rate" in self.evaluate.metrics and self.evaluate.judge is None:
            found.append(("evaluate.metrics", "win_rate needs evaluate.judge, which compares two answers"))
        return found + self.model.problems_in(self) + self.algorithm.problems_in(self)

    @property
    def mixed_text(self) -> Ptx | None:
        """The text that updates learn from beside completions; None where there is none, or its weight is 0."""
        return self.ptx if self.ptx is not None and self.ptx.coef > 0 else None

    @property
    def keeps_reference(self) -> bool:
        """Whether the model that the policy began as is kept: for the penalty, or because it is the adapters' base."""
        return self.algorithm.penalises or self.adapters is not None

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that are trained in place of the model's weights."""
        return self.model.lora if isinstance(self.model, Pretrained) else None

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
        shards = math.prod(max(sizes[axis], 1) for axis in BATCH_AXES)
        rows, left = divmod(self.completions, self.algorithm.minibatches)
        if not left and rows % shards and not self.completions % shards:
            text = f"an update reads {rows} completions, no multiple of the mesh's batch shards (at least {shards})"
            found.append(("algorithm.minibatches", text))
        if sizes["sequence"] > 1:
            found.append(("mesh.sequence", "a decoder has no sequence parallelism yet: leave it at 1"))
        return found
