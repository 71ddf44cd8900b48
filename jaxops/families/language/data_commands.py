"""`jaxops data inspect` and `jaxops data preview` for text, and for pairs of texts."""

import functools

from jaxops.data.preferences.open import read_judgements
from jaxops.data.preferences.opened import OpenedJudgements
from jaxops.data.preferences.preview import counted, previewed
from jaxops.data.preferences.spec import PreferenceData, RatingData
from jaxops.data.text.open import TextParts, read_text
from jaxops.data.text.preview import preview
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.families.language.config import LanguageConfig
from jaxops.families.language.opened import open_model
from jaxops.run.family import Shown

PREVIEWED = 2
"""The rows that `data preview` shows."""


def inspect_data(config: LanguageConfig) -> Shown:
    """Counts a config's texts and tokens, and says what is odd about them; of judgements also how far people agree.

    Raises:
      UserError: the data or their tokenizer cannot be opened.
    """
    if config.pairs:
        return Shown(*counted(_opened_pairs(config)[0]))
    text, _ = _opened(config)
    rows = []
    for name, value in text.inspection.items():
        shown = ", ".join(f"{key} {count:,}" for key, count in value.items()) if isinstance(value, dict) else str(value)
        rows.append((name, shown))
    return Shown(text.inspection, rows)


def preview_data(config: LanguageConfig) -> Shown:
    """Shows the first rows or pairs of training as text, with what the loss sees of them in brackets.

    Raises:
      UserError: the data or their tokenizer cannot be opened.
    """
    if config.pairs:
        pairs, tokenizer = _opened_pairs(config)
        lines = previewed(pairs, tokenizer, config.run.seed, PREVIEWED, marked=True)
        notes = list(pairs.inspection.get("notes", ()))
        return Shown({"rows": lines, "notes": notes}, [(line,) for line in [*lines, *notes]])
    text, tokenizer = _opened(config)
    source = text.source(config.run.seed)
    plain = preview(source, tokenizer, min(PREVIEWED, source.examples)).plain
    notes = list(text.inspection.get("notes", ()))
    return Shown({"rows": plain, "notes": notes}, [(line,) for line in [*plain.splitlines(), *notes]])


def _opened(config: LanguageConfig) -> tuple[TextParts, Tokenizer]:
    assert not isinstance(config.data, PreferenceData | RatingData)
    text = functools.cache(functools.partial(read_text, config.data))
    tokenizer = open_model(config, lambda: text().words).tokenizer
    return text().opened(tokenizer), tokenizer


def _opened_pairs(config: LanguageConfig) -> tuple[OpenedJudgements, Tokenizer]:
    assert isinstance(config.data, PreferenceData | RatingData)
    read = read_judgements(config.data)
    tokenizer = open_model(config, lambda: read.words).tokenizer
    return read.opened(tokenizer, answers=True), tokenizer
