"""The language family: a decoder on text or on pairs of texts, from a config to a task, and from a run to a model."""

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxops.config.load import Loaded
from jaxops.core.failures import UserError
from jaxops.core.sums import Sums
from jaxops.data import notes
from jaxops.data.preferences.open import read_judgements
from jaxops.data.preferences.spec import PreferenceData, RatingData
from jaxops.data.text.documents import with_learnt_template
from jaxops.data.text.open import TextParts, read_text
from jaxops.families.language.config import LanguageConfig
from jaxops.families.language.data_commands import inspect_data, preview_data
from jaxops.families.language.opened import OpenedModel, open_model
from jaxops.families.language.options import LanguagePredict
from jaxops.families.language.outline import outlined
from jaxops.families.language.pairs import pair_fields
from jaxops.families.language.prompt_form import written_as
from jaxops.families.language.serving import ServedLanguage
from jaxops.families.language.written_samples import ReferenceAnswer, WithSamples, asked_of
from jaxops.models.lora import on_model
from jaxops.objectives.language import next_token
from jaxops.run.batched import BatchedEvaluation
from jaxops.run.callables import objective_from
from jaxops.run.family import Family, Given
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.export import DecoderExport
from jaxops.run.pretrained.options import Generate
from jaxops.run.pretrained.pinned import pinned
from jaxops.run.pretrained.stored import stored
from jaxops.run.task import About, EvalBatches, Evaluation, NoEvaluation, Task, of_config


def build(loaded: Loaded[LanguageConfig], given: Given) -> Task:
    """Opens model, tokenizer and data of a config and puts its task together.

    Raises:
      UserError: something cannot be opened, or does not go together.
    """
    loaded = pinned(loaded)
    config = loaded.config
    if given.data is not None or given.model is not None:
        raise UserError("a language model's data and model come from its config; an objective may be given")
    if isinstance(config.data, PreferenceData | RatingData):
        read = read_judgements(config.data)
        opened = open_model(config, lambda: read.words)
        fields = pair_fields(config, given, opened, read.opened(opened.tokenizer, answers=True))
    else:
        text = functools.cache(functools.partial(read_text, config.data))
        opened = open_model(config, lambda: text().words)
        fields = _text_fields(config, given, opened, text().opened(opened.tokenizer))
    learnt = written_as(config.data).template
    return Task(
        **of_config(config, loaded.resolved, opened.model),
        **fields,
        start=(lambda: opened.sources) if opened.sources else None,
        frozen=getattr(opened.model, "frozen", ()),
        dtypes=getattr(opened.model, "dtypes", ()),
        transform=stored(opened.decoder.config, with_learnt_template(opened.tokenizer, learnt)),
    )


def outline(loaded: Loaded[LanguageConfig], given: Given, folder: Path) -> Task:
    """Puts the task of a config together over stand-ins in `folder`: only its shapes and programs count.

    Raises:
      UserError: nothing tells the architecture, or the number of token ids.
    """
    with notes.collected(quiet=True):  # they would be about stand-ins
        return build(outlined(loaded, folder), given)


def _text_fields(config: LanguageConfig, given: Given, opened: OpenedModel, text: TextParts) -> dict[str, Any]:
    """Returns the fields of a Task that depend on its text."""
    return {
        "objective": on_model(opened.model, objective_from(config.objective, given.objective, opened.decoder)),
        "source": text.source(config.run.seed),
        "evaluation": _evaluation(config, opened, text) if text.held_out(1) else NoEvaluation(),
        "inspection": {**text.inspection, "split": {"sha256": text.inspection["digest"]}},
        "about": _about(config, opened, text),
    }


def _evaluation(config: LanguageConfig, opened: OpenedModel, text: TextParts) -> Evaluation:
    """Returns the evaluation on the held-out rows of all sources, each token counted alike, with samples if asked."""
    objective = on_model(opened.model, next_token(opened.decoder))

    def batches(size: int) -> EvalBatches:
        return list(itertools.chain.from_iterable(text.held_out(size).values()))

    def sums(params: Any, batch: Mapping[str, Any]) -> Sums:
        found = objective(params, batch, None)
        return {name.removeprefix("loss/"): value for name, value in found.items()}

    found, length = BatchedEvaluation({"valid": batches}, sums), opened.decoder.config.length
    asked: list[ReferenceAnswer] = []
    for one in text.sources:
        documents = one.valid.documents if one.valid is not None else None
        if documents is not None:
            left = config.evaluate.samples - len(asked)
            asked += asked_of(documents, range(len(documents)), length, left)
    return WithSamples(found, opened, asked) if asked else found


def _about(config: LanguageConfig, opened: OpenedModel, text: TextParts) -> About:
    model = config.model.weights if isinstance(config.model, Pretrained) else "decoder"
    parts = [text.inspection] if "train" in text.inspection else text.inspection["sources"]
    rows = [("tokenizer", f"{opened.tokenizer.kind}, {opened.tokenizer.vocab:,} ids")]
    for at, part in enumerate(parts):
        where = f" of source {at}" if len(parts) > 1 else ""
        for name in ("train", "valid"):
            if name in part:
                counts = part[name]
                told = f"{counts['documents']:,} texts, {counts['tokens']:,} tokens, {counts['learnt']:,} learnt from"
                rows.append((f"{name}{where}", told))
    note = "Each figure is a mean over the tokens that are learnt from; of NLL and perplexity less is better."
    return About(model=model, headline="perplexity", data=rows, notes=[note])


def restore(saved: Any) -> ServedLanguage:
    """Restores the trained language model of a run.

    Raises:
      UserError: the run folder lacks a part of it.
    """
    return ServedLanguage(saved)


FAMILY = Family(
    config=LanguageConfig,
    build=build,
    load=restore,
    data={"inspect": inspect_data, "preview": preview_data},
    predict=LanguagePredict,
    export=DecoderExport,
    generate=Generate,
    outline=outline,
)
