"""Stand-ins for planning: weights and texts of the right shapes, where the real ones need not be there.

A plan reads shapes alone. The stand-in weights are a `config.json` and a sparse file of safetensors, which has its
header and, of its numbers, nothing on disk. So a 27 GB model is opened as it would be, in no time and no space.
Tested in tests/plan/test_outlines.py.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jaxops.core.failures import UserError
from jaxops.data import hub
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.data.text.trained_tokenizer import TrainedTokenizer
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.huggingface import architecture_of, config_json
from jaxops.models.decoder.tensors import tensor_shapes
from jaxops.run.load import open_saved_run
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.stored import keeps_decoder, stored_architecture

NEEDED = "a plan needs no weights, but it needs their shapes: a folder with config.json, a run, or hf://ORG/MODEL"


def architecture_at(address: str) -> Architecture:
    """Returns the architecture of the weights at an address; the weights themselves need not be there.

    Raises:
      UserError: nothing at the address tells the architecture.
    """
    if address.startswith(hub.HUB):
        folder = hub.HubAddress.parse(address).fetched(("config.json",))
    else:
        folder = Path(address.removeprefix("gguf://")).expanduser()
    if address.startswith("gguf://") or folder.suffix == ".gguf":
        from jaxops.models.decoder.gguf import open_gguf

        return open_gguf(str(folder)).architecture
    if (folder / "checkpoints").is_dir():
        saved = open_saved_run(folder)
        if not keeps_decoder(saved):
            raise UserError(f"model.weights: {address} is a run of task {saved.config.task}, which has no decoder")
        return stored_architecture(saved)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.weights: there is no {address}; {NEEDED}")
    try:
        values = json.loads((folder / "config.json").read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{folder / 'config.json'} is no JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'} is no JSON object")
    return architecture_of(values, str(folder / "config.json"))


def stand_in_weights(model: Pretrained, folder: Path) -> Pretrained:
    """Returns the choice of a model with weights of the same shapes in `folder`, of which nothing lies on disk.

    Raises:
      UserError: nothing at `model.weights` tells the architecture.
    """
    architecture = architecture_at(model.weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(architecture)))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensor_shapes(architecture).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return dataclasses.replace(model, weights=str(folder))


def stand_in_tokenizer(model: Any, tokenizer: str | TrainedTokenizer | None, added: int = 0) -> tuple[Any, str]:
    """Returns the model, with its number of token ids, and the tokenizer of bytes in place of its own.

    Args:
      model: an architecture, or stand-in weights.
      tokenizer: the config's tokenizer.
      added: the number of tokens that the config adds.

    Raises:
      UserError: nothing tells the number of ids.
    """
    if isinstance(model, Architecture) and model.vocab is None:
        if isinstance(tokenizer, TrainedTokenizer):
            return dataclasses.replace(model, vocab=tokenizer.vocab), "bytes"
        if tokenizer != "bytes":
            raise UserError(f"model.vocab: a plan does not open the tokenizer {tokenizer}: give the number of its ids")
        return dataclasses.replace(model, vocab=ByteTokenizer().vocab + added), "bytes"
    return model, "bytes"


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    """Writes rows as JSON lines and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
