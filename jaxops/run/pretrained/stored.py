"""What a run folder keeps of a decoder beside its parameters: the architecture and the tokenizer's files."""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np

from jaxops.config.load import from_dict
from jaxops.core.failures import UserError
from jaxops.data.text.open_tokenizer import tokenizer_of
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.models.decoder.architecture import Architecture
from jaxops.run.saved_run import SavedRun

ARCHITECTURE, FILES = "architecture", "tokenizer.files"


def stored(architecture: Architecture, tokenizer: Tokenizer) -> Mapping[str, np.ndarray]:
    """Returns the arrays that a run folder keeps: texts as bytes."""
    arrays = {ARCHITECTURE: _bytes(json.dumps(dataclasses.asdict(architecture)).encode())}
    arrays[FILES] = _bytes(json.dumps(sorted(tokenizer.files)).encode())
    return arrays | {f"tokenizer.{name}": _bytes(content) for name, content in tokenizer.files.items()}


def keeps_decoder(saved: SavedRun) -> bool:
    """Returns whether a run folder keeps an architecture, and so the parameters of a decoder."""
    try:
        saved.transform(ARCHITECTURE)
    except UserError:
        return False
    return True


def stored_architecture(saved: SavedRun) -> Architecture:
    """Returns the architecture of a run's model.

    Raises:
      UserError: the run folder lacks it, or it is damaged.
    """
    text = saved.transform(ARCHITECTURE).astype(np.uint8).tobytes()
    where = f"{saved.folder.where}/transform/{ARCHITECTURE}"
    try:
        values = json.loads(text)
    except ValueError:
        raise UserError(f"{where}: not JSON; the run folder is damaged") from None
    found: Architecture = from_dict(Architecture, values, [], source=where).config
    return found


def stored_tokenizer(saved: SavedRun) -> Tokenizer:
    """Returns the tokenizer of a run's model.

    Raises:
      UserError: the run folder lacks a file of it, or one is damaged.
    """
    where = f"{saved.folder.where}/transform"
    try:
        names = json.loads(saved.transform(FILES).astype(np.uint8).tobytes())
    except ValueError:
        raise UserError(f"{where}/{FILES}: not JSON; the run folder is damaged") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}/{FILES}: expected names of files; the run folder is damaged")
    content = lambda name: saved.transform(f"tokenizer.{name}").astype(np.uint8).tobytes()
    return tokenizer_of({name: content(name) for name in names}, where)


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)
