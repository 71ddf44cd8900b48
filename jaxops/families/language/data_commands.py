"""`jaxops data inspect` and `jaxops data preview` for text."""

from jaxops.data.text.open import TextParts, open_text
from jaxops.data.text.preview import preview
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.families.language.config import LanguageConfig
from jaxops.families.language.opened import open_model
from jaxops.run.family import Shown

PREVIEWED = 2
"""The rows that `data preview` shows."""


def inspect_data(config: LanguageConfig) -> Shown:
    """Counts a config's texts and tokens, and says what is odd about them.

    Raises:
      UserError: the text or its tokenizer cannot be opened.
    """
    text, _ = _opened(config)
    rows = []
    for name, value in text.inspection.items():
        shown = ", ".join(f"{key} {count:,}" for key, count in value.items()) if isinstance(value, dict) else str(value)
        rows.append((name, shown))
    return Shown(text.inspection, rows)


def preview_data(config: LanguageConfig) -> Shown:
    """Shows the first rows of training as text, with what the loss sees of them in brackets.

    Raises:
      UserError: the text or its tokenizer cannot be opened.
    """
    text, tokenizer = _opened(config)
    source = text.source(config.run.seed)
    plain = preview(source, tokenizer, min(PREVIEWED, source.examples)).plain
    notes = list(text.inspection.get("notes", ()))
    return Shown({"rows": plain, "notes": notes}, [(line,) for line in [*plain.splitlines(), *notes]])


def _opened(config: LanguageConfig) -> tuple[TextParts, Tokenizer]:
    tokenizer = open_model(config).tokenizer
    return open_text(config.data, tokenizer), tokenizer
