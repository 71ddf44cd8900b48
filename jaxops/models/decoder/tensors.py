"""The tensors of Hugging Face's files and the decoder's stacked parameters: one table that is read in both directions.

A stacked parameter is presented as a virtual array over the files of its layers, so that a slice of it reads the bytes
of that slice. PyTorch's linear layers are [out, in] and are transposed; GPT-2's are [in, out], and its queries, keys
and values are columns of one tensor. Tested in tests/models/test_pretrained.py.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder

LAYER = "{layer}"
PREFIX = {"rope": "model.", "learned": "transformer."}
"""The prefix of all names but the head's, by kind of positions; files of a bare model lack it."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """The place of one parameter, or of one layer of it, in the files.

    Attributes:
      path: the parameter's path.
      name: the tensor's name; `{layer}` stands for the number of the layer.
      shape: the parameter's shape without layers, and without the vocabulary's padding.
      transposed: the tensor is [out, in].
      start: the first column of the tensor that is the parameter's; None if all are.
      vocab: the dimension of the parameter that is the vocabulary, padded in memory, or None.
      room: the size of that dimension in memory.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    start: int | None = None
    vocab: int | None = None
    room: int = 0

    @property
    def stacked(self) -> bool:
        """Whether there is a tensor for each layer."""
        return LAYER in self.name

    @property
    def memory(self) -> tuple[int, ...]:
        """The shape in memory, without layers."""
        return tuple(self.room if axis == self.vocab else size for axis, size in enumerate(self.shape))


_ROPE_NAMES = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "norm_attention": "input_layernorm",
}
_PRE_NORMS = {"norm_mlp": "post_attention_layernorm"}
_POST_NORMS = {
    "norm_attention_out": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_mlp_out": "post_feedforward_layernorm",
}
_LEARNED_NAMES = {
    "attention/query": "attn.c_attn",
    "attention/key": "attn.c_attn",
    "attention/value": "attn.c_attn",
    "attention/out": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
    "norm_attention": "ln_1",
    "norm_mlp": "ln_2",
}


@functools.lru_cache(maxsize=16)
def pieces(a: Architecture) -> tuple[Piece, ...]:
    """Returns where each parameter of the architecture is in the files."""
    decoder = Decoder(a)
    return tuple(_piece(decoder, path, tuple(leaf.shape)) for path, leaf in named_leaves(decoder.shapes))


def _piece(decoder: Decoder, path: str, shape: tuple[int, ...]) -> Piece:
    a, learned = decoder.config, decoder.config.positions == "learned"
    prefix = PREFIX[a.positions]
    vocab = {"embed/embedding": 0, "head/kernel": 1}.get(path)
    if vocab is not None:
        real = tuple(decoder.real_vocab if axis == vocab else size for axis, size in enumerate(shape))
        embed = f"{prefix}{'wte' if learned else 'embed_tokens'}.weight"
        name = embed if path == "embed/embedding" else "lm_head.weight"
        return Piece(path, name, real, transposed=vocab == 1, vocab=vocab, room=decoder.rows)
    if path == "position/embedding":
        return Piece(path, f"{prefix}wpe.weight", shape)
    module, leaf = path.rsplit("/", 1)
    end = ".bias" if leaf == "bias" else ".weight"
    if module == "norm":
        return Piece(path, f"{prefix}{'ln_f' if learned else 'norm'}{end}", shape)
    module = module.removeprefix("layers/")
    if not learned:
        names = _ROPE_NAMES | (_POST_NORMS if a.post_norms else _PRE_NORMS)
        return Piece(path, f"{prefix}layers.{LAYER}.{names[module]}{end}", shape[1:], transposed=leaf == "kernel")
    name = f"{prefix}h.{LAYER}.{_LEARNED_NAMES[module]}{end}"
    if module not in ("attention/query", "attention/key", "attention/value"):
        return Piece(path, name, shape[1:])
    queries, keys = a.heads * a.width, a.key_heads * a.width
    start = {"query": 0, "key": queries, "value": queries + keys}[module.rsplit("/", 1)[1]]
    return Piece(path, name, shape[1:], start=start)


def tensor_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of all tensors of a model, as files hold them."""
    found: dict[str, tuple[int, ...]] = {}
    for piece, name, _ in _every(a):
        shape = piece.shape[::-1] if piece.transposed else piece.shape
        if piece.start is not None:
            shape = (*shape[:-1], max(piece.start + shape[-1], found.get(name, (0,))[-1]))
        found[name] = shape
    return found


def _every(a: Architecture) -> Iterator[tuple[Piece, str, int]]:
    """Yields every piece of every layer, with its name and the number of its layer; layers stand together."""
    table = pieces(a)
    for piece in table:
        if not piece.stacked:
            yield piece, piece.name, 0
    for layer in range(a.layers):
        for piece in table:
            if piece.stacked:
                yield piece, piece.name.replace(LAYER, str(layer)), layer


@dataclasses.dataclass(frozen=True)
class View:
    """One tensor in a file, seen as one layer of a parameter: transposed, cut and padded where it is sliced.

    Attributes:
      piece: the place of the parameter.
      name: name of the tensor in messages.
      array: the tensor: anything that is sliced like a numpy array.
    """

    piece: Piece
    name: str
    array: Any

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice, of the parameter's shape in memory.

        Raises:
          UserError: it holds a number that is not finite.
        """
        piece, missing = self.piece, [(0, 0)] * len(index)
        cut = [part.indices(size)[:2] for part, size in zip(index, piece.memory, strict=True)]
        if piece.vocab is not None:
            start, stop = cut[piece.vocab]
            real = piece.shape[piece.vocab]
            cut[piece.vocab] = min(start, real), min(stop, real)
            missing[piece.vocab] = 0, (stop - start) - (cut[piece.vocab][1] - cut[piece.vocab][0])
        if piece.start is not None:
            cut[-1] = cut[-1][0] + piece.start, cut[-1][1] + piece.start
        slices = tuple(slice(*ends) for ends in cut)
        part = np.asarray(self.array[slices[::-1]]).T if piece.transposed else np.asarray(self.array[slices])
        if not np.isfinite(part).all():
            raise UserError(f"{self.name} holds numbers that are not finite (NaN or infinity): the weights are damaged")
        return np.pad(part, missing) if any(after for _, after in missing) else part


class Stack:
    """A parameter over the tensors of its layers (one alone where it has no layers), read slice by slice."""

    def __init__(self, piece: Piece, views: Sequence[View]):
        self._views, self._stacked = views, piece.stacked
        self.shape = (len(views), *piece.memory) if piece.stacked else piece.memory
        self.dtype = np.dtype(functools.reduce(jnp.promote_types, (np.dtype(view.array.dtype) for view in views)))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if not self._stacked:
            return self._views[0][index]
        layers = range(*index[0].indices(len(self._views)))
        if not layers:
            return np.empty((0, *(len(range(*p.indices(n))) for p, n in zip(index[1:], self.shape[1:], strict=True))))
        parts = [self._views[layer][index[1:]].astype(self.dtype, copy=False) for layer in layers]
        return np.stack(parts)


def stacked(a: Architecture, tensors: Mapping[str, Any], where: str) -> dict[str, Stack]:
    """Returns the parameters of the architecture by path, over tensors that have been checked (`tensor_shapes`)."""
    views: dict[str, list[View]] = {}
    of_path: dict[str, Piece] = {}
    for piece, name, _ in _every(a):
        views.setdefault(piece.path, []).append(View(piece, f"{where}: {name}", tensors[name]))
        of_path[piece.path] = piece
    return {path: Stack(of_path[path], found) for path, found in views.items()}


class Cut:
    """A tensor that is made from parameters when it is written, so that the host holds one at a time."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, parts: list[tuple[Piece, Any, int]]):
        self.shape, self.dtype, self.parts = shape, np.dtype(dtype), parts

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        found = []
        for piece, leaf, layer in self.parts:
            one = np.asarray(leaf[layer] if piece.stacked else leaf)[tuple(slice(size) for size in piece.shape)]
            found.append(one.T if piece.transposed else one)
        whole = found[0] if len(found) == 1 else np.concatenate(found, axis=-1)
        if not np.isfinite(whole).all():
            raise UserError(f"{self.parts[0][0].path} holds numbers that are not finite (NaN or infinity)")
        with np.errstate(over="raise"):
            try:
                return whole.astype(self.dtype if dtype is None else dtype)
            except FloatingPointError:
                raise UserError(f"{self.parts[0][0].path} holds numbers that do not fit into {self.dtype}") from None


def unstacked(a: Architecture, params: Mapping[str, Any], dtype: Any = None) -> dict[str, Cut]:
    """Returns the tensors of a model by name, as files hold them.

    Args:
      a: the architecture.
      params: its parameters by path.
      dtype: dtype of the tensors; None keeps each parameter's.
    """
    shapes = tensor_shapes(a)
    parts: dict[str, list[tuple[Piece, Any, int]]] = {}
    for piece, name, layer in _every(a):
        parts.setdefault(name, []).append((piece, params[piece.path], layer))
    for found in parts.values():
        found.sort(key=lambda part: part[0].start or 0)
    return {
        name: Cut(shapes[name], found[0][1].dtype if dtype is None else dtype, found) for name, found in parts.items()
    }
