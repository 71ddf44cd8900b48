"""Opens the decoder that a config names: its architecture, its tokenizer, and where its weights come from."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.core.failures import UserError, nearest
from jaxops.core.weights import Rename, WeightSource
from jaxops.data import hub
from jaxops.data.sources import local
from jaxops.data.text.open_tokenizer import open_tokenizer
from jaxops.data.text.tokenizer import Tokenizer, check_vocabulary
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder, build_decoder
from jaxops.models.decoder.pretrained import open_pretrained
from jaxops.models.lora import LORA, LoraConfig
from jaxops.run.load import open_saved_run
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.stored import (
    POLICY,
    decoder_subtree,
    keeps_decoder,
    stored_architecture,
    stored_tokenizer,
)


@dataclasses.dataclass(frozen=True)
class OpenedDecoder:
    """A decoder before its parameters are read.

    Attributes:
      decoder: the decoder.
      tokenizer: the tokenizer.
      sources: the weights that training begins with; none for fresh parameters.
      special: ids of special tokens as an exported model names them.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    sources: tuple[WeightSource, ...]
    special: Mapping[str, int | list[int]]


def open_decoder(
    model: Architecture | Pretrained,
    tokenizer: str | None,
    length: int,
    add_tokens: tuple[str, ...] = (),
    *,
    reads: str = "data.length",
) -> OpenedDecoder:
    """Opens the decoder of a config; nothing but headers of its weights is read.

    Args:
      model: the config's choice.
      tokenizer: the address of the tokenizer; None takes that of the weights.
      length: the number of tokens that it is to read at once.
      add_tokens: further control tokens.
      reads: the fields of the config that say so, for messages.

    Raises:
      UserError: the weights or the tokenizer cannot be opened, or do not go together.
    """
    if not isinstance(model, Pretrained):
        assert tokenizer is not None  # the config's problems
        words = _with_tokens(open_tokenizer(_place(tokenizer, hub.TOKENIZER, "tokenizer")), add_tokens)
        return OpenedDecoder(build_decoder(model, words.vocab), words, (), special_ids(words))
    address = model.weights
    architecture, own, sources = _from(address, tokenizer is None)
    _require_same_adapters(address, sources, model.lora)
    found = own if tokenizer is None else open_tokenizer(_place(tokenizer, hub.TOKENIZER, "tokenizer"))
    if found is None:
        raise UserError(f"tokenizer: {address} comes without one; name it (`bytes`, a folder or a GGUF file)")
    words = _with_tokens(found, add_tokens)
    assert architecture.vocab is not None
    check_vocabulary(words, architecture.vocab, address)
    if length > architecture.length:
        raise UserError(f"{reads}: {length} tokens in a row, but {address} reads {architecture.length} at most")
    architecture = dataclasses.replace(architecture, dropout=model.dropout, remat=model.remat)
    return OpenedDecoder(build_decoder(architecture), words, sources, special_ids(words))


def _from(address: str, wants_tokenizer: bool) -> tuple[Architecture, Tokenizer | None, tuple[WeightSource, ...]]:
    """Returns architecture, tokenizer (None where there is none) and weights at an address."""
    address = _place(address, hub.MODEL, "model.weights")
    path = Path(address.removeprefix("gguf://")).expanduser()
    if not path.exists():
        raise UserError(_gone(address, path))
    if address.startswith("gguf://") or path.suffix == ".gguf":
        from jaxops.models.decoder.gguf import open_gguf

        found = open_gguf(address.removeprefix("gguf://"))
        return found.architecture, open_tokenizer(address) if wants_tokenizer else None, (found.source,)
    if (path / "checkpoints").is_dir():
        return _from_run(path)
    found = open_pretrained(path)
    has = (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file()
    return found.architecture, open_tokenizer(address) if wants_tokenizer and has else None, (found.source,)


def _gone(address: str, path: Path) -> str:
    """Returns the message for weights that are not where the config says."""
    near = nearest(address, [f"{path.parent}/{found.name}" for found in path.parent.glob("*")])
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", address) and path.parts[0] != "runs"
    hint = f" (a model of the Hugging Face Hub is hf://{address})" if on_hub else ""
    return (
        f"model.weights: there is no {address}{hint}{near or '.'} To go on or to be evaluated, a run opens the weights"
        " that it began with: keep them where they are. `predict`, `sample` and `export` read the run folder alone"
    )


def _place(address: str, files: tuple[str, ...], option: str) -> str:
    """Returns the path of what an address names, fetched if it is named or of the Hub; any other address as it is.

    Raises:
      UserError: it cannot be fetched.
    """
    if not address.startswith(hub.HUB):
        return local(address)
    try:
        return str(hub.HubAddress.parse(address).fetched(files))
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def _from_run(path: Path) -> tuple[Architecture, Tokenizer, tuple[WeightSource, ...]]:
    saved = open_saved_run(path)
    if not keeps_decoder(saved):
        raise UserError(f"model.weights: {path} is a run of task {saved.config.task}, which keeps no language model")
    below = decoder_subtree(saved)
    rename = [Rename(f"^{below}", "")] if below else []
    with saved.source(match=f"^{below}" if below else "", rename=rename) as source:
        return stored_architecture(saved), stored_tokenizer(saved), (source,)


def _require_same_adapters(address: str, sources: Sequence[WeightSource], lora: LoraConfig | None) -> None:
    """Refuses weights with adapters beside them, unless the same adapters are to be trained on.

    Without them, or under another scale, rank or choice of kernels, the weights are another model.
    """
    adapters = (f"{LORA}/", f"{POLICY}{LORA}/")
    if not any(name.startswith(adapters) for source in sources for name in source.arrays.shapes()):
        return
    there = getattr(open_saved_run(local(address)).config.model, "lora", None)
    if lora is None or lora != there:
        what = "which would be left out" if lora is None else f"which were trained as {there}, not as {lora}"
        raise UserError(
            f"model.weights: {address} has adapters beside its weights, {what}: `jaxops export` writes a folder with"
            " both merged, to begin with, or give the same model.lora to train the adapters on"
        )


def _with_tokens(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> Tokenizer:
    return tokenizer.with_tokens(tokens) if tokens else tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the ids of special tokens under the names that Hugging Face's files give them."""
    stops: int | list[int] | None = list(tokenizer.stops) if len(tokenizer.stops) > 1 else tokenizer.eos
    named = {"bos_token_id": tokenizer.bos, "eos_token_id": stops, "pad_token_id": tokenizer.pad}
    return {name: value for name, value in named.items() if value is not None}
