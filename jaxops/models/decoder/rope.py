"""Rotary position embeddings: wavelengths of each kind of layer, and the rotation of queries and keys."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxops.models.decoder.architecture import Architecture, LayerKind, Rope


def frequencies(architecture: Architecture, kind: LayerKind) -> tuple[np.ndarray, float]:
    """Returns the angle per position of each pair of dimensions [width / 2], and the factor on what is rotated."""
    rope, width = architecture.rope, architecture.width
    if kind == "window" and rope.window_theta is not None:
        return _plain(rope.window_theta, width), 1.0
    plain = _plain(rope.theta, width)
    if rope.scaling == "linear":
        return plain / rope.factor, 1.0
    if rope.scaling == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.scaling == "yarn":
        return _yarn(rope, plain, width)
    return plain, 1.0


def _plain(theta: float, width: int) -> np.ndarray:
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def _blend(stretched: np.ndarray, plain: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Mixes both, `share` of the plain ones, clipped to [0, 1]."""
    share = np.clip(share, 0.0, 1.0)
    return (1 - share) * stretched + share * plain


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Stretches wavelengths that turn seldom within the original length, and leaves those that turn often."""
    assert rope.original_length is not None
    turns = rope.original_length * plain / (2 * math.pi)
    share = (turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
    return _blend(plain / rope.factor, plain, share)


def _yarn(rope: Rope, plain: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """Stretches by number of turns, with a ramp that is linear in the dimension (Peng et al. 2023, section 3.2)."""
    assert rope.original_length is not None
    length = rope.original_length

    def dimension(turns: float) -> float:
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (np.arange(width // 2) - low) / max(high - low, 0.001)
    magnitude = rope.magnitude
    if magnitude is None:
        magnitude = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return _blend(plain / rope.factor, plain, 1 - ramp), magnitude


def turns(
    architecture: Architecture, kind: LayerKind, position: Int[Array, "batch length"]
) -> Float[Array, "two batch length half"]:
    """Returns cosine and sine of every pair's angle at these positions, float32."""
    angle_per_position, magnitude = frequencies(architecture, kind)
    angles = position.astype(jnp.float32)[..., None] * jnp.asarray(angle_per_position, jnp.float32)[None, None]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * jnp.float32(magnitude)


def rotate(
    x: Float[Array, "batch length heads width"], turned: Float[Array, "two batch length half"]
) -> Float[Array, "batch length heads width"]:
    """Rotates the pairs (i, i + width / 2) of every head, in float32."""
    cosine, sine = turned[0][:, :, None], turned[1][:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
