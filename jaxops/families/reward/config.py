"""The config of a reward model's run: the common sections, and its model, tokenizer, judgements and objective."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from jaxops.config.types import ByPath, Factory
from jaxops.core.metric import Metric, metric_of
from jaxops.data.preferences.spec import ChoiceData, PreferenceData, RatingData
from jaxops.data.text.trained_tokenizer import TrainedTokenizer
from jaxops.evaluate.preferences import METRICS
from jaxops.models.decoder.architecture import Architecture
from jaxops.objectives.preference import BestOfK, BradleyTerry
from jaxops.run.config import EarlyStop, Evaluate, RunConfig
from jaxops.run.pretrained.config import Pretrained

Ensemble = Annotated[int, Field(ge=1, le=64)]
SHOWN = ("accuracy", "accuracy_low", "accuracy_high", "log_loss", "ece", "longer_bias", "first_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshReward(Architecture):
    """A decoder with fresh parameters, under `ensemble` heads that each read a score at the last token."""

    ensemble: Ensemble = 1

    @property
    def architecture(self) -> Architecture:
        """The decoder alone."""
        return Architecture(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Architecture)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedReward(Pretrained):
    """A language model whose weights are read from elsewhere, under `ensemble` fresh heads.

    With `frozen` the heads alone are trained: what the weights make of each text is computed once and kept cached.
    """

    ensemble: Ensemble = 1
    frozen: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardEvaluate(Evaluate):
    """Evaluates every `every` steps on the held-out judgements, and at its end with the kept parameters."""

    metrics: tuple[str, ...] = SHOWN
    batch: Annotated[int, Field(ge=1)] = 64
    stop: EarlyStop | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """A run of a reward model.

    `model` is a decoder with fresh parameters, or `{weights: ...}` of a language model, such as the run of one. Its
    scores are served with a mean of 0 and a deviation of 1 on `reference` texts of training. `tokenizer` is that of the
    weights by default, else `bytes`, a folder with tokenizer.json, a GGUF file, or `{kind: trained}`: a vocabulary made
    out of the texts of training.
    """

    task: str = "reward"
    data: PreferenceData | ChoiceData | RatingData
    model: FreshReward | PretrainedReward = FreshReward()
    tokenizer: str | TrainedTokenizer | None = None
    reference: Annotated[int, Field(ge=2, le=100_000)] = 256
    objective: BradleyTerry | BestOfK | Annotated[ByPath, Factory(leading=1)] = BradleyTerry()
    evaluate: RewardEvaluate = RewardEvaluate()

    def metric(self, name: str) -> Metric:
        """Returns the metric of this name.

        Raises:
          UserError: there is no such metric; the message names the nearest right one.
        """
        return metric_of(METRICS, name)

    def problems(self) -> list[tuple[str, str]]:
        """Returns (dotted path, message) of everything that cannot work on any machine."""
        found = super().problems()
        if isinstance(self.model, FreshReward):
            if self.tokenizer is None:
                text = "a model with fresh parameters has none: `bytes`, a folder's path, or {kind: trained}"
                found.append(("tokenizer", text))
            if self.data.length > self.model.length:
                text = f"{self.data.length} tokens in a text, but the model reads {self.model.length} (model.length)"
                found.append(("data.length", text))
        elif isinstance(self.tokenizer, TrainedTokenizer):
            found.append(("tokenizer", "the weights know their own vocabulary: leave it out, or name its folder"))
        if isinstance(self.model, PretrainedReward) and self.model.frozen:
            found += self._frozen_problems(self.model)
        choices = isinstance(self.data, ChoiceData)
        if not isinstance(self.objective, ByPath) and isinstance(self.objective, BestOfK) != choices:
            text = f"`{self.objective.kind}` does not learn from data.kind {self.data.kind}: take "
            found.append(("objective.kind", text + ("`best_of_k`" if choices else "`bradley_terry`")))
        if self.batch.pack:
            found.append(("batch.pack", "is for recommenders; each text has a row of its own"))
        if self.data.valid is None and (self.evaluate.stop is not None or self.checkpoint.best is not None):
            found.append(("data.valid", "nothing is held out, but evaluate.stop or checkpoint.best judge by it"))
        if "disagreement" in self.evaluate.metrics and self.model.ensemble == 1:
            found.append(
                ("evaluate.metrics", "one head cannot disagree: `disagreement` needs model.ensemble 2 or more")
            )
        return found + self.model.problems_in(self) + self.objective.problems_in(self)

    def _frozen_problems(self, model: PretrainedReward) -> list[tuple[str, str]]:
        """Returns what does not go with frozen weights, which read each text once before training."""
        found = []
        if model.lora is not None:
            found.append(("model.lora", "adapters change what model.frozen keeps as it is: leave one of them out"))
        if model.dropout:
            found.append(("model.dropout", "frozen weights read each text once, without dropout: leave it at 0"))
        if self.init_from is not None:
            found.append(("init_from", "would put other weights below model.frozen: name them in model.weights"))
        return found

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """Returns (dotted path, message) of everything that cannot work on a mesh of these sizes."""
        found = super().mesh_problems(sizes) + self.model.mesh_problems(sizes)
        if sizes["sequence"] > 1:
            found.append(("mesh.sequence", "a decoder has no sequence parallelism yet: leave it at 1"))
        return found
