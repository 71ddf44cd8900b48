"""Opens the model that a config names: its architecture, its tokenizer, and where its weights come from."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxops.core.failures import UserError
from jaxops.core.weights import WeightSource
from jaxops.data.sources import local
from jaxops.data.text.open_tokenizer import open_tokenizer
from jaxops.data.text.tokenizer import Tokenizer, check_vocabulary
from jaxops.families.language.config import LanguageConfig, Pretrained
from jaxops.families.language.stored import stored_architecture, stored_tokenizer
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder, build_decoder
from jaxops.models.decoder.pretrained import open_pretrained
from jaxops.models.lora import Lora
from jaxops.run.load import open_saved_run

Result = TypeVar("Result")


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

    def on(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Returns a function of the decoder's parameters as one of what is trained."""
        return on(self.model, function)


def on(model: Decoder | Lora, function: Callable[..., Result]) -> Callable[..., Result]:
    """Returns a function of the decoder's parameters as one of the model's, where that has adapters."""
    return model.on(function) if isinstance(model, Lora) else function


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
    if not isinstance(config.model, Pretrained):
        assert config.tokenizer is not None  # LanguageConfig.problems
        tokenizer = _with_tokens(open_tokenizer(local(config.tokenizer)), config.add_tokens)
        decoder = build_decoder(config.model, tokenizer.vocab)
        return OpenedModel(decoder, decoder, tokenizer, (), special_ids(tokenizer))
    address = config.model.weights
    architecture, own, sources = _from(address, config.tokenizer is None)
    found = own if config.tokenizer is None else open_tokenizer(local(config.tokenizer))
    if found is None:
        raise UserError(f"tokenizer: {address} comes without one; name it (`bytes`, a folder or a GGUF file)")
    tokenizer = _with_tokens(found, config.add_tokens)
    assert architecture.vocab is not None
    check_vocabulary(tokenizer, architecture.vocab, address)
    if config.data.length > architecture.length:
        raise UserError(
            f"data.length: {config.data.length} tokens in a row, but {address} reads {architecture.length} at most"
        )
    architecture = dataclasses.replace(architecture, dropout=config.model.dropout, remat=config.model.remat)
    decoder = build_decoder(architecture)
    return OpenedModel(decoder, with_adapters(decoder, config), tokenizer, sources, special_ids(tokenizer))


def _from(address: str, wants_tokenizer: bool) -> tuple[Architecture, Tokenizer | None, tuple[WeightSource, ...]]:
    """Returns architecture, tokenizer (None where there is none) and weights at an address."""
    address = local(address)
    if address.startswith("hf://"):
        raise UserError("model.weights: hf:// addresses come next; give the folder that `hf download` made")
    path = Path(address).expanduser()
    if address.startswith("gguf://") or path.suffix == ".gguf":
        from jaxops.models.decoder.gguf import open_gguf

        found = open_gguf(address.removeprefix("gguf://"))
        return found.architecture, open_tokenizer(address) if wants_tokenizer else None, (found.source,)
    if (path / "checkpoints").is_dir():
        return _from_run(path)
    found = open_pretrained(path)
    has = (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file()
    return found.architecture, open_tokenizer(address) if wants_tokenizer and has else None, (found.source,)


def _from_run(path: Path) -> tuple[Architecture, Tokenizer, tuple[WeightSource, ...]]:
    saved = open_saved_run(path)
    if saved.config.task != "language":
        raise UserError(f"model.weights: {path} is a run of task {saved.config.task}, not of a language model")
    with saved.source() as source:
        return stored_architecture(saved), stored_tokenizer(saved), (source,)


def _with_tokens(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> Tokenizer:
    return tokenizer.with_tokens(tokens) if tokens else tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the ids of special tokens under the names that Hugging Face's files give them."""
    stops: int | list[int] | None = list(tokenizer.stops) if len(tokenizer.stops) > 1 else tokenizer.eos
    named = {"bos_token_id": tokenizer.bos, "eos_token_id": stops, "pad_token_id": tokenizer.pad}
    return {name: value for name, value in named.items() if value is not None}
