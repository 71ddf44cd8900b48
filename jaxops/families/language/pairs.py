"""The parts of a task that trains a policy on pairs of texts: objective, source, evaluation, and what people read."""

from typing import Any

import numpy as np

from jaxops.data.preferences.opened import OpenedJudgements
from jaxops.data.preferences.pairs import Pairs
from jaxops.evaluate.judged_pairs import LABELS, agreement_notes, agreement_rows, baselines, count_rows
from jaxops.families.language.config import LanguageConfig
from jaxops.families.language.opened import OpenedModel
from jaxops.families.language.pair_evaluation import PairEvaluation, logprobs_of_both
from jaxops.families.language.written_samples import WithSamples, asked_of
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.reference import WithReference
from jaxops.objectives.direct_preference import Dpo, Ipo, against_reference
from jaxops.run.callables import objective_from
from jaxops.run.family import Given
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.task import About, Evaluation, NoEvaluation


def pair_fields(config: LanguageConfig, given: Given, opened: OpenedModel, data: OpenedJudgements) -> dict[str, Any]:
    """Returns the fields of a Task that depend on its judgements of pairs.

    A user's own objective gets the decoder and the policy's parameters, and the reference's logprobs in its batch.

    Args:
      config: the config.
      given: what Python hands in.
      opened: the model, which holds a reference.
      data: the judgements.
    """
    model, decoder = opened.model, opened.decoder
    assert not isinstance(model, Decoder)  # pairs have a reference beside the policy, or under its adapters
    valid = data.valid
    chunk = config.objective.chunk if isinstance(config.objective, Dpo | Ipo) else None
    objective = objective_from(config.objective, given.objective, decoder)
    return {
        "objective": against_reference(objective, decoder, model.policy, model.base, chunk=chunk),
        "source": data.source(config.run.seed),
        "evaluation": NoEvaluation() if valid is None else _evaluation(config, opened, valid),
        "copies": model.copies if isinstance(model, WithReference) else {},
        "baselines": None
        if valid is None or not config.evaluate.baselines
        else lambda: baselines(valid, data.agreement),
        "inspection": {**data.inspection, "split": {"sha256": data.inspection["digest"]}},
        "about": _about(config, opened, data),
    }


def _evaluation(config: LanguageConfig, opened: OpenedModel, valid: Pairs) -> Evaluation:
    """Returns the evaluation on held-out pairs, with samples if the config asks for any."""
    model, decoder = opened.model, opened.decoder
    assert not isinstance(model, Decoder)
    shipped = config.objective if isinstance(config.objective, Dpo | Ipo) else None
    chunk = None if shipped is None else shipped.chunk
    found = PairEvaluation(valid, logprobs_of_both(decoder, model.policy, model.base, chunk=chunk), shipped)
    documents, better = valid.texts.documents, np.where(valid.label >= 0.5, valid.sides[:, 0], valid.sides[:, 1])
    asked = asked_of(documents, better, decoder.config.length, config.evaluate.samples)
    return WithSamples(found, opened, asked) if asked else found


def _about(config: LanguageConfig, opened: OpenedModel, data: OpenedJudgements) -> About:
    model = config.model.weights if isinstance(config.model, Pretrained) else "decoder"
    rows = [("tokenizer", f"{opened.tokenizer.kind}, {opened.tokenizer.vocab:,} ids")]
    rows += [*count_rows(data.inspection), *agreement_rows(data.agreement)]
    notes = [
        "A text's reward is beta times its log-probability under the policy less that under the reference. Accuracy is "
        "how often the text that people prefer has the higher one, on held-out judgements that are not ties; its 95 % "
        "interval counts them for what a bootstrap over prompts or texts says they are worth.",
        "Rewards and logprobs of chosen and rejected are means over the better and the worse texts, each a sum over "
        "its tokens. NLL and perplexity are of the tokens of the better texts.",
    ]
    notes += agreement_notes(data.agreement)
    return About(model=model, labels=LABELS, headline="accuracy", data=rows, notes=notes)
