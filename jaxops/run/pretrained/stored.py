"""What a run folder keeps of a decoder: the architecture, the tokenizer's files, and where its parameters lie."""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np

from jaxops.config.load import from_dict
from jaxops.core.failures import UserError
from jaxops.data.text.open_tokenizer import tokenizer_of
from jaxops.data.text.tokenizer import Tokenizer, json_object
from jaxops.models import policy as models_policy
from jaxops.models.decoder.architecture import Architecture
from jaxops.run.saved_run import SavedRun

ARCHITECTURE, FILES = "architecture", "tokenizer.files"
POLICY = f"{models_policy.POLICY}/"
"""The beginning of the decoder's paths in a run that keeps other models beside it: value, reference, rewards."""


def stored(architecture: Architecture, tokenizer: Tokenizer) -> Mapping[str, np.ndarray]:
    """Returns the arrays that a run folder keeps: texts as bytes."""
    arrays = {ARCHITECTURE: _bytes(json.dumps(dataclasses.asdict(architecture)).encode())}
    arrays[FILES] = _bytes(json.dumps(sorted(tokenizer.files)).encode())
    return arrays | {f"tokenizer.{name}": _bytes(content) for name, content in tokenizer.files.items()}


def keeps_decoder(saved: SavedRun) -> bool:
    """Returns whether a run folder keeps an architecture, and so the parameters of a decoder."""
    return saved.folder.has_transform(ARCHITECTURE)


def decoder_subtree(saved: SavedRun) -> str:
    """Returns what the paths of the decoder's parameters begin with in a run's checkpoint: `POLICY`, or nothing.

    Raises:
      UserError: the manifest of the checkpoint is damaged.
    """
    with saved.source() as source:
        return POLICY if any(name.startswith(POLICY) for name in source.arrays.shapes()) else ""


def stored_architecture(saved: SavedRun) -> Architecture:
    """Returns the architecture of a run's model.

    Raises:
      UserError: the run folder lacks it, it is damaged, or it is of a far larger model than the checkpoint holds.
    """
    where = f"{saved.folder.where}/transform/{ARCHITECTURE}"
    values = json_object(_content(saved, ARCHITECTURE), where)
    found: Architecture = from_dict(Architecture, values, [], source=where).config
    _require_possible(found, saved, where)
    return found


def stored_tokenizer(saved: SavedRun) -> Tokenizer:
    """Returns the tokenizer of a run's model.

    Raises:
      UserError: the run folder lacks a file of it, or one is damaged.
    """
    where = f"{saved.folder.where}/transform"
    try:
        names = json.loads(_content(saved, FILES))
    except (ValueError, RecursionError):
        raise UserError(f"{where}/{FILES}: not JSON; the run folder is damaged") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}/{FILES}: expected names of files; the run folder is damaged")
    return tokenizer_of({name: _content(saved, f"tokenizer.{name}") for name in names}, where)


def _require_possible(found: Architecture, saved: SavedRun, where: str) -> None:
    """Refuses sizes that the checkpoint cannot hold, before as much as the shapes of such a model are computed.

    What is left of smaller differences is refused by `SavedRun.expect`.
    """
    entries = saved.entries()
    sizes = {"dim": 1, "layers": found.dim, "vocab": found.dim, "hidden": found.dim, "heads": 1, "head_dim": 1}
    sizes |= {"length": found.dim} if found.positions == "learned" else {}
    for name, each in sizes.items():
        value = getattr(found, name)
        if value is not None and value * each > entries:
            raise UserError(
                f"{where}: {name} is {value:,}, and the whole checkpoint of step {saved.step} has {entries:,} numbers;"
                " the run folder is damaged"
            )


def _content(saved: SavedRun, name: str) -> bytes:
    """Returns the bytes that an array of the transform holds."""
    found = saved.transform(name)
    if found.dtype != np.uint8 or found.ndim != 1:
        raise UserError(
            f"{saved.folder.where}/transform/{name}: expected bytes, got {found.dtype} {list(found.shape)}; the run"
            " folder is damaged"
        )
    return found.tobytes()


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)
