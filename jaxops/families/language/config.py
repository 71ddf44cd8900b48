"""The config of a language model's run: the common sections, and its model, tokenizer, text and objective."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from jaxops.config.types import ByPath, Factory
from jaxops.core.metric import Metric, metric_of
from jaxops.data.preferences.spec import PreferenceData, RatingData
from jaxops.data.text.spec import ChatData, CompletionData, MixtureData, TextData
from jaxops.data.text.trained_tokenizer import TrainedTokenizer
from jaxops.evaluate import implicit_rewards
from jaxops.models.decoder.architecture import Architecture
from jaxops.objectives.direct_preference import Dpo, Ipo
from jaxops.objectives.language import NextTokenConfig
from jaxops.run.config import MAY_CHANGE_ON_RESUME, EarlyStop, Evaluate, RunConfig
from jaxops.run.pretrained.config import Pretrained

METRICS: Mapping[str, Metric] = {
    "nll": Metric("nll", "lower", "NLL"),
    "perplexity": Metric("perplexity", "lower", "Perplexity"),
    "accuracy": Metric("accuracy", "higher", "Next-token accuracy"),
    "entropy": Metric("entropy", "neither", "Entropy"),
}
"""The metrics of a language model on text, each a mean over the tokens that are learnt from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageEvaluate(Evaluate):
    """Evaluates every `every` steps on the held-out part of the text, and at its end with the kept parameters.

    `samples` held-out prompts are completed at each evaluation, greedily, and stand in `samples.jsonl` and the report
    beside the answers that the data has for them.
    """

    metrics: tuple[str, ...] = ("nll", "perplexity", "accuracy")
    batch: Annotated[int, Field(ge=1)] = 16
    samples: Annotated[int, Field(ge=0, le=64)] = 0
    stop: EarlyStop | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig(RunConfig):
    """A run of a language model: on text, or on pairs of texts of which people prefer one.

    `model` is an architecture with fresh parameters, or `{weights: ...}` of a pretrained model. `tokenizer` is `bytes`,
    a folder with tokenizer.json, a GGUF file, or `hf://ORG/MODEL`; by default it is that of the weights. A fresh
    model's may be `{kind: trained}` too: a vocabulary made out of the texts of training. `add_tokens` are further
    control tokens, whose rows of the embedding are fresh.

    On pairs the objective is `dpo` or `ipo`. The reference begins as a copy of the policy; with `lora` it is the base,
    and there is no copy.
    """

    task: str = "language"
    data: TextData | ChatData | CompletionData | MixtureData | PreferenceData | RatingData
    model: Architecture | Pretrained = Architecture()
    tokenizer: str | TrainedTokenizer | None = None
    add_tokens: tuple[str, ...] = ()
    objective: NextTokenConfig | Dpo | Ipo | Annotated[ByPath, Factory(leading=1)] = NextTokenConfig()
    evaluate: LanguageEvaluate = LanguageEvaluate()

    may_change_on_resume: ClassVar[tuple[str, ...]] = (*MAY_CHANGE_ON_RESUME, "evaluate.samples")

    @property
    def pairs(self) -> bool:
        """True where the data are judgements of pairs of texts."""
        return isinstance(self.data, PreferenceData | RatingData)

    def metric(self, name: str) -> Metric:
        """Returns the metric of this name.

        Raises:
          UserError: there is no such metric; the message names the nearest right one.
        """
        return metric_of(implicit_rewards.METRICS if self.pairs else METRICS, name)

    def problems(self) -> list[tuple[str, str]]:
        """Returns (dotted path, message) of everything that cannot work on any machine."""
        found = super().problems()
        if isinstance(self.model, Architecture):
            if self.tokenizer is None:
                found.append(("tokenizer", "a model with fresh parameters has none: `bytes`, or a folder's path"))
            if self.data.length > self.model.length:
                text = f"{self.data.length} tokens in a row, but the model reads {self.model.length} (model.length)"
                found.append(("data.length", text))
        if self.batch.pack:
            found.append(("batch.pack", "is for recommenders; text is packed by data.pack"))
        if self.evaluate.samples and _held_out(self.data) is None:
            found.append(("evaluate.samples", "nothing is held out (data.valid), so there are no prompts to complete"))
        judged = self.evaluate.stop is not None or self.checkpoint.best is not None
        if judged and _held_out(self.data) is None:
            found.append(("data.valid", "nothing is held out, but evaluate.stop or checkpoint.best judge by it"))
        if isinstance(self.tokenizer, TrainedTokenizer):
            found += self._vocabulary_problems()
        found += self._pair_problems()
        return found + self.model.problems_in(self) + self.objective.problems_in(self)

    def _vocabulary_problems(self) -> list[tuple[str, str]]:
        """Returns what does not go with a vocabulary that is made out of the texts of training."""
        if isinstance(self.model, Pretrained):
            return [("tokenizer", "the weights know their own vocabulary: leave it out, or name its folder")]
        return [("add_tokens", "a vocabulary that is trained has no further tokens")] if self.add_tokens else []

    def _pair_problems(self) -> list[tuple[str, str]]:
        """Returns what does not go together of data, objective and model, where one of them is for pairs of texts."""
        objective, kind = self.objective, self.data.kind
        own = isinstance(objective, ByPath)
        if not own and (objective.sort == "pairs") != self.pairs:
            if self.pairs:
                instead = "take `dpo` or `ipo`; a model of scores is `task: reward`"
                return [("objective.kind", f"`{objective.kind}` learns from single texts, not from {kind}: {instead}")]
            instead = "take data.kind preferences or ratings, or objective.kind next_token"
            return [("objective.kind", f"`{objective.kind}` compares two answers, not so `{kind}`: {instead}")]
        found = []
        if self.pairs and own and "loss" in self.evaluate.metrics:
            found.append(("evaluate.metrics", "`loss` is measured of `dpo` and `ipo`, not of one's own objective"))
        if self.pairs and self.init_from is not None and getattr(self.model, "lora", None) is not None:
            text = "under adapters the base is the reference: begin with model.weights, whose adapters are told"
            found.append(("init_from", text))
        return found

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """Returns (dotted path, message) of everything that cannot work on a mesh of these sizes."""
        found = super().mesh_problems(sizes) + self.model.mesh_problems(sizes)
        if sizes["sequence"] > 1:
            found.append(("mesh.sequence", "a decoder has no sequence parallelism yet: leave it at 1"))
        return found


def _held_out(data: Any) -> Any:
    """Returns what the data hold out; None where that is nothing."""
    sources = data.sources if isinstance(data, MixtureData) else (data,)
    return next((one.valid for one in sources if one.valid is not None), None)
