"""Opens the model that a config of the language family names: the decoder, and the adapters beside it."""

import dataclasses
from collections.abc import Mapping

from jaxops.core.weights import WeightSource
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.families.language.config import LanguageConfig
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.lora import Lora
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.opened import open_decoder


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A language model before its parameters are read.

    Attributes:
      decoder: the decoder.
      model: what is trained: the decoder, or its adapters beside it.
      tokenizer: the tokenizer.
      sources: the weights that training begins with; none for fresh parameters.
      special: ids of special tokens as an exported model names them.
    """

    decoder: Decoder
    model: Decoder | Lora
    tokenizer: Tokenizer
    sources: tuple[WeightSource, ...]
    special: Mapping[str, int | list[int]]


def with_adapters(decoder: Decoder, config: LanguageConfig) -> Decoder | Lora:
    """Returns the decoder, with the adapters of the config where it has any.

    Raises:
      UserError: the adapters do not fit the decoder.
    """
    lora = config.model.lora if isinstance(config.model, Pretrained) else None
    return decoder if lora is None else Lora(decoder, lora)


def open_model(config: LanguageConfig) -> OpenedModel:
    """Opens the model of a config; nothing but headers of its weights is read.

    Raises:
      UserError: the weights or the tokenizer cannot be opened, or do not go together.
    """
    found = open_decoder(config.model, config.tokenizer, config.data.length, config.add_tokens)
    model = with_adapters(found.decoder, config)
    return OpenedModel(found.decoder, model, found.tokenizer, found.sources, found.special)
