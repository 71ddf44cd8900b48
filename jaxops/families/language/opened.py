"""Opens the model that a config of the language family names: the decoder, and the adapters beside it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxops.core.failures import UserError
from jaxops.core.weights import WeightSource
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.data.text.trained_tokenizer import TrainedTokenizer
from jaxops.families.language.config import LanguageConfig
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder, build_decoder
from jaxops.models.lora import LORA, Lora
from jaxops.models.reference import WithReference
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.opened import OpenedDecoder, open_decoder, special_ids


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A language model before its parameters are read.

    Attributes:
      decoder: the decoder.
      model: what is trained: the decoder, its adapters beside it, or the decoder beside its reference.
      tokenizer: the tokenizer.
      sources: the weights that training begins with; none for fresh parameters.
      special: ids of special tokens as an exported model names them.
    """

    decoder: Decoder
    model: Decoder | Lora | WithReference
    tokenizer: Tokenizer
    sources: tuple[WeightSource, ...]
    special: Mapping[str, int | list[int]]


def trained_model(decoder: Decoder, config: LanguageConfig) -> Decoder | Lora | WithReference:
    """Returns the decoder with all that a run of this config keeps beside it: adapters, or a frozen reference.

    Raises:
      UserError: the adapters do not fit the decoder.
    """
    lora = config.model.lora if isinstance(config.model, Pretrained) else None
    if lora is not None:
        return Lora(decoder, lora)
    return WithReference(decoder, config.precision.compute) if config.pairs else decoder


def open_model(config: LanguageConfig, words: Callable[[], Sequence[str]] = list) -> OpenedModel:
    """Opens the model of a config; nothing but headers of its weights is read.

    Args:
      config: the config.
      words: gives the texts of training, for a vocabulary that is made out of them.

    Raises:
      UserError: the weights or the tokenizer cannot be opened, or do not go together.
    """
    found = _opened_decoder(config, words)
    model = trained_model(found.decoder, config)
    if config.pairs and isinstance(model, Lora) and any(map(_has_adapters, found.sources)):
        raise UserError(
            f"model.weights: {found.sources[0].name} has adapters beside its weights, and under model.lora the"
            " reference would be the weights without them: `jaxops export` writes a folder with both merged, to begin"
            " with"
        )
    return OpenedModel(found.decoder, model, found.tokenizer, found.sources, found.special)


def _opened_decoder(config: LanguageConfig, words: Callable[[], Sequence[str]]) -> OpenedDecoder:
    if not isinstance(config.tokenizer, TrainedTokenizer):
        return open_decoder(config.model, config.tokenizer, config.data.length, config.add_tokens)
    assert isinstance(config.model, Architecture)  # LanguageConfig.problems
    tokenizer = config.tokenizer.build(words())
    return OpenedDecoder(build_decoder(config.model, tokenizer.vocab), tokenizer, (), special_ids(tokenizer))


def _has_adapters(source: WeightSource) -> bool:
    return any(name.startswith(f"{LORA}/") for name in source.arrays.shapes())
