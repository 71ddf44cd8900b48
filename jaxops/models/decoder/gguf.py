"""GGUF files (llama.cpp) as a source of weights, dequantised slice by slice with the `gguf` package.

The metadata gives the architecture, and the tensors are presented under Hugging Face's names, so that one table serves
both. Tested in tests/models/test_gguf.py.
"""

import importlib
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxops.core.failures import UserError, nearest
from jaxops.core.named_arrays import HostArrays
from jaxops.core.weights import WeightSource
from jaxops.models.decoder.architecture import Architecture, Rope
from jaxops.models.decoder.huggingface import canonical
from jaxops.models.decoder.pretrained import PretrainedDecoder, matched
from jaxops.models.decoder.tensors import stacked

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""The types of tensors that are read."""
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"^blk\.(\d+)\.([a-z_]+)\.(weight|bias)$")
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


class Quantised:
    """A tensor of a GGUF file: its rows are dequantised when they are sliced.

    Args:
      package: the `gguf` package.
      tensor: the tensor, as its reader gives it.
      order: the row of the file for each row, or None if they stand in order.
    """

    def __init__(self, package: Any, tensor: Any, order: np.ndarray | None = None):
        self._package, self._tensor, self._order = package, tensor, order
        self.shape = tuple(int(size) for size in reversed(tensor.shape))
        self._plain = tensor.tensor_type.name in ("F32", "F16")
        self.dtype = tensor.data.dtype if self._plain else np.dtype(np.float32)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        # Blocks lie along a row, so that whole rows are read, and then cut.
        rows: Any = index[0] if self._order is None else self._order[index[0]]
        if len(self.shape) == 1:
            whole = self._tensor.data if self._plain else self._dequantised(self._tensor.data)
            return whole[rows]
        part = self._tensor.data[rows]
        return (part if self._plain else self._dequantised(part))[:, index[1]]

    def _dequantised(self, data: np.ndarray) -> np.ndarray:
        return self._package.quants.dequantize(data, self._tensor.tensor_type)


def open_gguf(path: str | os.PathLike[str]) -> PretrainedDecoder:
    """Opens a GGUF file; only its metadata is read.

    Raises:
      UserError: the `gguf` package is not installed, the file is missing or damaged, its architecture or the type of a
        tensor is not known, or tensors are missing, left over or of other shapes.
    """
    path = os.fspath(path)
    try:
        package = importlib.import_module("gguf")
    except ImportError:
        raise UserError(f"{path}: reading GGUF needs the package gguf: pip install 'jaxops[gguf]'") from None
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    try:
        reader = package.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not _is_long(name)}
    except (ValueError, KeyError, IndexError, OverflowError, OSError, MemoryError) as error:
        raise UserError(f"{path} is no GGUF file, or is damaged: {str(error)[:200]}") from error
    found = {tensor.name: tensor for tensor in reader.tensors}
    metadata = _Metadata(fields, path)
    architecture = _architecture(metadata, found)
    tensors = {}
    for name, tensor in found.items():
        if tensor.tensor_type.name not in TYPES:
            raise UserError(f"{path}: {name} is of type {tensor.tensor_type.name} (known: {', '.join(TYPES)})")
        order = _rotary_order(architecture, name) if metadata.kind == "llama" else None
        tensors[_hf_name(name, path)] = Quantised(package, tensor, order)
    source = WeightSource(path, HostArrays(stacked(architecture, matched(architecture, tensors, path), path)))
    special = {key: fields.get(f"tokenizer.ggml.{name}_token_id") for key, name in _SPECIAL.items()}
    return PretrainedDecoder(
        architecture, source, {key: int(value) for key, value in special.items() if value is not None}
    )


def _is_long(name: str) -> bool:
    """Whether a field is a list of the tokenizer, which would take seconds to unpack."""
    return name.startswith("tokenizer.") and not name.endswith("_token_id")


class _Metadata:
    """The fields of a file under the prefix of its architecture."""

    def __init__(self, fields: Mapping[str, Any], path: str):
        self.fields, self.path = fields, path
        self.kind = str(fields.get("general.architecture"))
        if self.kind not in ARCHITECTURES:
            raise UserError(
                f"{path}: general.architecture {self.kind[:80]!r} is not known (known: {', '.join(ARCHITECTURES)})"
                f"{nearest(self.kind, ARCHITECTURES)}"
            )

    def get(self, key: str) -> Any:
        return self.fields.get(f"{self.kind}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | np.integer) or value < 1:
            raise UserError(f"{self.path}: {self.kind}.{key} is {str(value)[:80]!r}, expected a positive integer")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float | np.number) or not value > 0:
            raise UserError(f"{self.path}: {self.kind}.{key} is {str(value)[:80]!r}, expected a positive number")
        return float(str(np.float32(value)))  # the number that was written, 1e-5, and not its binary neighbour


def _architecture(metadata: _Metadata, tensors: Mapping[str, Any]) -> Architecture:
    path, kind = metadata.path, metadata.kind
    for key in ("expert_count", "attention.sliding_window"):
        if metadata.get(key):
            raise UserError(f"{path}: {kind}.{key} is {metadata.get(key)}, which is not known in a GGUF file")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: the tensor token_embd.weight is missing")
    scaling = metadata.get("rope.scaling.type") or "none"
    if scaling not in ("none", "linear") or "rope_freqs.weight" in tensors:
        raise UserError(f"{path}: its rotary embeddings are scaled in a way that is not known in a GGUF file")
    rope = Rope(theta=metadata.number("rope.freq_base", 10_000.0))
    if scaling == "linear":
        factor = metadata.number("rope.scaling.factor")
        rope = Rope(theta=rope.theta, scaling="linear", factor=factor)
    dim, heads = metadata.whole("embedding_length"), metadata.whole("attention.head_count")
    width = metadata.whole("attention.key_length", dim // heads)
    if metadata.whole("rope.dimension_count", width) != width:
        raise UserError(f"{path}: {kind}.rope.dimension_count is not the width of a head, {width}")
    found = Architecture(
        vocab=int(tensors["token_embd.weight"].shape[-1]),
        dim=dim,
        layers=metadata.whole("block_count"),
        heads=heads,
        kv_heads=metadata.whole("attention.head_count_kv", heads),
        head_dim=width,
        hidden=metadata.whole("feed_forward_length"),
        length=metadata.whole("context_length"),
        norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        qk_norm=kind == "qwen3",
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tied="output.weight" not in tensors,
    )
    if bad := found.all_problems():
        raise UserError(f"{path}: " + "; ".join(f"{name}: {message}" for name, message in bad))
    return canonical(found)


def _hf_name(name: str, path: str) -> str:
    """Returns Hugging Face's name of a tensor."""
    if (found := _LAYER.match(name)) and found[2] in _NAMES:
        return f"model.layers.{found[1]}.{_NAMES[found[2]]}.{found[3]}"
    module, _, leaf = name.rpartition(".")
    if module in _NAMES and leaf in ("weight", "bias"):
        return f"{_NAMES[module]}.{leaf}"
    raise UserError(f"{path}: the tensor {name[:80]} is not known{nearest(module, _NAMES)}")


def _rotary_order(a: Architecture, name: str) -> np.ndarray | None:
    """Returns the row of the file for each row of queries or keys.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a `llama`, where the decoder rotates rows half a head apart.
    """
    found = _LAYER.match(name)
    if not found or found[2] not in ("attn_q", "attn_k"):
        return None
    heads = a.heads if found[2] == "attn_q" else a.key_heads
    return np.arange(heads * a.width).reshape(heads, a.width // 2, 2).swapaxes(1, 2).reshape(-1)
