"""Pretrained decoders: folders as Hugging Face's libraries keep them, opened as a source of weights, and written.

Tested in tests/models/test_pretrained.py.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from jaxops.core.failures import UserError, nearest
from jaxops.core.named_arrays import HostArrays
from jaxops.core.safetensors import INDEX, MAX_HEADER, SINGLE, open_safetensors, save_safetensors
from jaxops.core.sharding import named_leaves
from jaxops.core.weights import WeightSource
from jaxops.core.whole_files import writing
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.decoder.huggingface import architecture_of, config_json
from jaxops.models.decoder.tensors import PREFIX, stacked, tensor_shapes, unstacked

CONFIG, GENERATION = "config.json", "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARD_BYTES = 5_000_000_000
_UNREAD = re.compile(r"(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)$")
"""Constants that old files hold beside the weights."""
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class PretrainedDecoder:
    """A model of others, opened: nothing but headers has been read.

    Attributes:
      architecture: its architecture.
      source: its weights, named by the paths of the decoder's parameters.
      special: the ids of special tokens as its files name them, `eos_token_id` and so on; one id or several.
    """

    architecture: Architecture
    source: WeightSource
    special: Mapping[str, int | list[int]]


def open_pretrained(folder: str | os.PathLike[str]) -> PretrainedDecoder:
    """Opens a folder with `config.json` and safetensors files; each device will read its own slices of them.

    Raises:
      UserError: a file is missing, truncated or invalid, the architecture is unknown, or tensors are missing, left
        over or of other shapes than the architecture's.

    Example:
      found = open_pretrained("SmolLM2-135M")
      decoder = Decoder(found.architecture)
      arrays, _ = load_weights(targets_of(decoder.shapes), [found.source])
      params = with_arrays(decoder.shapes, arrays)
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    config = _read_json(folder / CONFIG)
    architecture = architecture_of(config, os.fspath(folder / CONFIG))
    tensors = matched(architecture, open_safetensors(folder), os.fspath(folder))
    source = WeightSource(os.fspath(folder), HostArrays(stacked(architecture, tensors, os.fspath(folder))))
    generation = _read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    both = {**config, **{key: value for key, value in generation.items() if value is not None}}
    special = {key: both[key] for key in SPECIAL if both.get(key) is not None}
    for key, value in special.items():
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(type(each) is int and each >= 0 for each in ids):
            raise UserError(f"{folder}: {key} is {str(value)[:80]!r}, expected a token id or a list of them")
    return PretrainedDecoder(architecture, source, special)


def matched(architecture: Architecture, tensors: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns exactly the tensors that the architecture has.

    The prefix of a bare model's names is added, and constants are left out, as is a head that is tied.

    Raises:
      UserError: tensors are missing, left over or of other shapes; the message names some of them.
    """
    wanted, prefix = tensor_shapes(architecture), PREFIX[architecture.positions]
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {name if name == "lm_head.weight" else prefix + name: array for name, array in tensors.items()}
    missing = [name for name in wanted if name not in tensors]
    left = [name for name in tensors if name not in wanted and not _UNREAD.search(name)]
    if architecture.tied and "lm_head.weight" in left:
        left.remove("lm_head.weight")
    if missing:
        near = nearest(missing[0], left)
        raise UserError(f"{where}: tensors of its architecture are missing: {_some(missing)}{near}")
    if left:
        raise UserError(f"{where}: it holds tensors that its architecture has not: {_some(left)}")
    other = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if tuple(tensors[name].shape) != shape
    ]
    if other:
        raise UserError(f"{where}: tensors have other shapes than {CONFIG} says: {_some(other)}")
    return {name: tensors[name] for name in wanted}


def save_pretrained(
    folder: str | os.PathLike[str],
    architecture: Architecture,
    params: PyTree,
    special: Mapping[str, int | list[int]] | None = None,
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights, `config.json` and `generation_config.json`, so that `transformers` opens the folder unedited.

    Args:
      folder: the folder; it is made.
      architecture: the architecture, with its vocabulary.
      params: the decoder's parameters, arrays that this process holds whole.
      special: ids of special tokens (`bos_token_id`, `eos_token_id`, `pad_token_id`).
      dtype: dtype of the files; None keeps each parameter's.
      shard_bytes: largest size of a file of weights; a larger tensor has a file of its own.

    Raises:
      UserError: the folder holds weights already, no model type has this architecture, the parameters are not the
        architecture's or not finite, or a number does not fit into `dtype`.
      RunFailed: a file cannot be written.
    """
    folder, special = Path(folder), dict(special or {})
    if unknown := [key for key in special if key not in SPECIAL]:
        raise UserError(f"special: {unknown[0]!r} is not known{nearest(unknown[0], SPECIAL)}")
    there = sorted(path.name for path in [*folder.glob("*.safetensors"), *folder.glob(INDEX)])
    if there:  # Beside new files, an old index would be read.
        raise UserError(f"{folder} holds weights already ({_some(there)}): name another folder, or remove them")
    config = config_json(architecture)
    leaves = dict(named_leaves(params))
    _require_parameters(leaves, architecture)
    tensors = unstacked(architecture, leaves, dtype)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, shard_bytes)
    for name, names in shards.items():
        save_safetensors(folder / name, {each: tensors[each] for each in names}, {"format": "pt"})
    if len(shards) > 1:
        places = {each: name for name, names in shards.items() for each in names}
        size = sum(map(_bytes, tensors.values()))
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    widest = max(tensors.values(), key=_bytes)
    _write_json(folder / GENERATION, {**special})
    _write_json(folder / CONFIG, {**config, **special, "torch_dtype": str(widest.dtype)})


def _require_parameters(leaves: Mapping[str, Any], architecture: Architecture) -> None:
    """Refuses parameters that are not those of the architecture, by path or by shape."""
    wanted = {path: tuple(x.shape) for path, x in named_leaves(Decoder(architecture).shapes)}
    apart = [f"{path} is missing" for path in wanted if path not in leaves]
    apart += [f"{path} is no parameter of it" for path in leaves if path not in wanted]
    apart += [
        f"{path} is {list(leaves[path].shape)}, expected {list(shape)}"
        for path, shape in wanted.items()
        if path in leaves and tuple(leaves[path].shape) != shape
    ]
    if apart:
        raise UserError(f"the parameters are not the architecture's: {_some(apart)}")


def _bytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _shards(tensors: Mapping[str, Any], most: int) -> dict[str, list[str]]:
    """Returns file name -> names of the tensors in it, in order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + _bytes(tensor) > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(tensor)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{at:05d}-of-{count:05d}.safetensors": names for at, names in enumerate(groups, 1)}


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises UserError if there is none."""
    try:
        if path.stat().st_size > MAX_HEADER:
            raise UserError(f"{path}: {path.stat().st_size} bytes, at most {MAX_HEADER} are allowed")
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object")
    return found


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with writing(path):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f", ... and {more} more" if more > 0 else "")
