"""Shows prompts as the model reads them."""

from jaxops.data.prompts.source import Prompts
from jaxops.data.text.formats import shown
from jaxops.data.text.tokenizer import Tokenizer


def preview(prompts: Prompts, tokenizer: Tokenizer, count: int, cursor: int = 0) -> str:
    """Returns the text of the first prompts after a cursor, decoded from their tokens, and the columns beside them."""
    lines: list[str] = []
    for example in prompts.batch(cursor, count)["id"].tolist():
        ids = prompts.ids_of(example)
        lines += [f"prompt {example}: {len(ids)} of {prompts.width} places filled ({prompts.where(example)})"]
        lines += [f"  {name}: {shown(value)}" for name, value in prompts.columns(example).items()]
        lines += [*tokenizer.decode(ids).split("\n"), ""]
    return "\n".join(lines)
