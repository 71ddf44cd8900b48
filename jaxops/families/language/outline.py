"""The outline of a language model's run: its config over stand-ins, of which a plan reads the shapes."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxops.config.load import Loaded
from jaxops.data.text.spec import ChatData, MixtureData, OneTextData, TextData, sources_of
from jaxops.families.language.config import LanguageConfig
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.stand_in import stand_in_tokenizer, stand_in_weights, write_rows


def outlined(loaded: Loaded[LanguageConfig], folder: Path) -> Loaded[LanguageConfig]:
    """Returns the config with stand-ins for weights, tokenizer and texts in `folder`; pairs are read as they are.

    Raises:
      UserError: nothing tells the architecture, or the number of token ids.
    """
    config = loaded.config
    model: Any = config.model
    if isinstance(model, Pretrained):
        model = stand_in_weights(model, folder / "weights")
    model, tokenizer = stand_in_tokenizer(model, config.tokenizer, len(config.add_tokens))
    data: Any = config.data
    if isinstance(data, MixtureData):
        data = dataclasses.replace(data, sources=tuple(_texts(one, folder) for one in sources_of(data)))
    elif not config.pairs:
        data = _texts(data, folder)
    evaluate = dataclasses.replace(config.evaluate, samples=0, stop=None)
    checkpoint = dataclasses.replace(config.checkpoint, best=None)
    config = dataclasses.replace(
        config, model=model, tokenizer=tokenizer, data=data, evaluate=evaluate, checkpoint=checkpoint
    )
    return dataclasses.replace(loaded, config=config)


def _texts(data: OneTextData, folder: Path) -> OneTextData:
    """Returns the data section over one example of its kind."""
    columns: Any = data.columns
    if isinstance(data, TextData):
        row: dict[str, Any] = {columns.text: "some text"}
    elif isinstance(data, ChatData):
        row = {columns.messages: [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    else:
        row = {columns.prompt: "a", columns.completion: "b"}
    path = write_rows(folder / f"{data.kind}.jsonl", row)
    more: dict[str, Any] = {} if isinstance(data, TextData) else {"template": "model", "arguments": {}}
    return dataclasses.replace(data, path=path, valid=None, format="auto", **more)
