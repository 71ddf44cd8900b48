"""The export of a decoder: a folder of config.json, safetensors and the tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from jaxops.core.failures import UserError
from jaxops.core.state import Params
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.pretrained import save_pretrained
from jaxops.run.outputs import whole_folder
from jaxops.run.pretrained.opened import special_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderExport:
    """The options of `export`: a folder that `transformers` and vLLM open; `dtype` is that of its files."""

    to: Literal["hf"] = "hf"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


def export_decoder(
    path: Path, architecture: Architecture, params: Params, tokenizer: Tokenizer, dtype: str | None = None
) -> str:
    """Writes a folder that `transformers` and vLLM open as it is, and returns a line for people that says so.

    Args:
      path: the folder, which is new or empty.
      architecture: the architecture.
      params: the decoder's parameters, with adapters merged.
      tokenizer: the tokenizer.
      dtype: the dtype of the files; None keeps that of the parameters.

    Raises:
      UserError: the folder exists and is not empty, or no published model type has this architecture.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty: name a new folder")
    with whole_folder(path) as folder:
        wanted: Any = None if dtype is None else jnp.dtype(dtype)
        save_pretrained(folder, architecture, params, special_ids(tokenizer), dtype=wanted)
        for name, content in tokenizer.files.items():
            if not (folder / name).exists():
                (folder / name).write_bytes(content)
    return f"{sum(1 for _ in path.iterdir())} files -> {path}"
