"""`jaxops data inspect` and `jaxops data preview` for prompts, for every family that answers some."""

from jaxops.data.prompts.open import OpenedPrompts
from jaxops.data.prompts.preview import preview
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.run.family import Shown

PREVIEWED = 2
"""The prompts that `data preview` shows."""


def inspect_prompts(opened: OpenedPrompts) -> Shown:
    """Counts prompts and their tokens, and says what is odd about them."""
    rows = []
    for name, value in opened.inspection.items():
        told = ", ".join(f"{key} {count:,}" for key, count in value.items()) if isinstance(value, dict) else str(value)
        rows.append((name, ", ".join(value) if name == "columns" else told))
    return Shown(opened.inspection, rows)


def preview_prompts(opened: OpenedPrompts, tokenizer: Tokenizer) -> Shown:
    """Shows the first prompts of training as the model reads them, and the columns that reach the rewards."""
    plain = preview(opened.train, tokenizer, min(PREVIEWED, opened.train.examples))
    remarks = list(opened.inspection.get("notes", ()))
    return Shown({"prompts": plain, "notes": remarks}, [(line,) for line in [*plain.splitlines(), *remarks]])
