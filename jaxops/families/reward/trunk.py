"""The features of texts under a frozen decoder: its hidden state at each text's last token, computed once and kept.

Heads on frozen weights read nothing else of a text. So training needs the decoder for one pass over the texts, not for
one every epoch. The cache (`features` in JAXOPS_CACHE) is named by a digest of the weights, of the dtypes and of the
texts' tokens, and is read through a memory map. Tested in tests/families/reward/test_frozen_trunk.py.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from jaxops.core.cache import cache_root
from jaxops.core.failures import NO_ROOM, RunFailed, UserError
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import named_leaves
from jaxops.core.state import Params
from jaxops.core.weights import cast_by_path, load_weights, targets_of, with_arrays
from jaxops.data import notes
from jaxops.data.preferences.pairs import FeaturedTexts, SingleTextBatches, Texts
from jaxops.data.scratch import folder_beside
from jaxops.families.reward.config import RewardConfig
from jaxops.families.reward.opened import OpenedReward
from jaxops.models.reward import REWARD, RewardModel
from jaxops.run.passes import Passes

VERSION = 1
SHORTEST = 16
"""The shortest row: texts are padded to it, or to the next power of two."""
TOKENS = 4096
"""Tokens that are read at a time."""


class Trunk:
    """A frozen decoder with the weights that a config names; calling it gives texts their features.

    Args:
      config: the config.
      opened: its model.

    Raises:
      UserError: the weights lack a part of the decoder, or cannot be read.
    """

    def __init__(self, config: RewardConfig, opened: OpenedReward):
        self._config, self._reward = config, opened.reward
        self._params = _weights(config, opened)
        self._mesh = make_mesh(data=-1, devices=jax.local_devices())
        self._passes: dict[int, Passes] = {}

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the decoder: its architecture, the values of its weights, and the dtype of computing."""
        shape = dataclasses.asdict(self._reward.decoder.config)
        found = hashlib.sha256(json.dumps([VERSION, shape, self._config.precision.compute], sort_keys=True).encode())
        for path, value in named_leaves(self._params):
            host = np.ascontiguousarray(value)
            found.update(f"{path} {host.dtype} {host.shape}".encode())
            found.update(host.view(np.uint8).data)
        return found.hexdigest()

    def __call__(self, texts: Texts) -> FeaturedTexts:
        """Returns the texts with their features, out of the cache or computed now.

        Raises:
          RunFailed: the disk is full, or the cache cannot be written.
        """
        parts = (texts.documents.tokens, texts.begin, texts.width)
        key = hashlib.sha256(self.digest.encode())
        for part in parts:
            key.update(np.ascontiguousarray(part).view(np.uint8).data)
        path = cache_root() / "features" / f"{key.hexdigest()}.npy"
        features = _read(path, (len(texts), self._reward.decoder.config.dim))
        if features is None:
            notes.LOGGER.warning(
                "data: computing the features of %s texts under the frozen weights, once", f"{len(texts):,}"
            )
            _write(path, self.features(texts))
            features = _read(path, (len(texts), self._reward.decoder.config.dim))
            if features is None:
                raise RunFailed(f"{path}: the features that were just written cannot be read")
        fields = {field.name: getattr(texts, field.name) for field in dataclasses.fields(Texts)}
        return FeaturedTexts(**fields, features=features)

    def features(self, texts: Texts) -> Float32[np.ndarray, "texts dim"]:
        """Returns the hidden state at the last token of each text, float32, computed on this machine's devices.

        A text's row is padded by its own length alone, so that its features do not depend on the other texts.
        """
        out = np.empty((len(texts), self._reward.decoder.config.dim), np.float32)
        with jax.set_mesh(self._mesh):
            weights = Passes.of(self._config, {}, self._mesh, 1).weights(self._params, {})
            for size, chosen in _by_size(texts):
                rows = dataclasses.replace(texts, begin=texts.begin[chosen], width=texts.width[chosen], length=size)
                if size not in self._passes:
                    self._passes[size] = Passes.of(self._config, {}, self._mesh, max(TOKENS // size, 1))
                passes = self._passes[size]
                batches = SingleTextBatches(rows, passes.size)
                found = passes.over("features", functools.partial(_last_hidden, self._reward), weights, batches)
                out[chosen] = np.concatenate([np.asarray(jax.device_get(one)) for one in found])[: len(chosen)]
        return out


def _last_hidden(reward: RewardModel, params: Params, batch: Any) -> Float[jax.Array, "batch dim"]:
    return reward.last_hidden(params, batch["tokens"], batch["segment"], batch["position"]).astype(jnp.float32)


def _by_size(texts: Texts) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the lengths of rows, and the numbers of the texts that are padded to each."""
    powers = SHORTEST * 2 ** np.ceil(np.log2(np.maximum(texts.width, 1) / SHORTEST)).clip(min=0).astype(np.int64)
    sizes = np.minimum(powers, max(texts.length, 1))
    for size in np.unique(sizes):
        yield int(size), np.flatnonzero(sizes == size)


def _weights(config: RewardConfig, opened: OpenedReward) -> Params:
    """Returns the decoder's parameters as the run's state would hold them, on the host."""
    shapes = {name: leaf for name, leaf in opened.reward.shapes.items() if name != REWARD}
    targets = targets_of(cast_by_path(shapes, [], config.precision.params))
    arrays, plan = load_weights(targets, opened.sources)
    if plan.left or plan.skipped:
        lacking = [*plan.left, *plan.skipped]
        raise UserError(
            f"model.weights: there is nothing for {', '.join(lacking[:4])}, which model.frozen keeps as it is"
        )
    return jax.tree.map(np.asarray, with_arrays(shapes, arrays))


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Opens features that were kept; None where there are none, or they are damaged."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        digest = path.with_suffix(".sha256").read_text()
    except (OSError, ValueError, EOFError):
        return None
    if found.shape != shape or found.dtype != np.float32 or _sha256(found) != digest:
        notes.LOGGER.warning("data: %s is damaged; its features are computed again", path)
        return None
    return found


def _write(path: Path, features: np.ndarray) -> None:
    try:
        with folder_beside(path) as scratch:
            np.save(scratch / path.name, features)
            (scratch / "digest").write_text(_sha256(features))
            (scratch / "digest").replace(path.with_suffix(".sha256"))
            (scratch / path.name).replace(path)
    except OSError as error:
        text = f"{path} cannot be written: {error}; set JAXOPS_CACHE elsewhere"
        raise (RunFailed if error.errno in NO_ROOM else UserError)(text) from error


def _sha256(features: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(features).view(np.uint8).data).hexdigest()
