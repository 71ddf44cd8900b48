"""Clipping of gradients by their global norm: one norm for all of them, or one for each group of paths.

Several models in one state (policy and value) have gradients of different size. With one norm over both, the larger
gradient would scale the smaller one down.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.core.sums import Max, Sum, Sums

Clip = float | Mapping[str, float] | None
"""The largest norm of all leaves together, or one for each path pattern, or None for no clipping. The key `default` is
for leaves that no pattern matches; without it those are not clipped."""
DEFAULT = "default"


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Returns the Euclidean norm of all leaves together, in float32."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.float32(0)))


def clip_gradients(grads: PyTree, clip: Clip) -> tuple[PyTree, Float[Array, ""], Sums]:
    """Returns gradients whose norm is at most `clip`, the norm of all leaves before clipping, and metrics of the norms.

    The metrics are `grad_norm` and `grad_norm_max` over all leaves and, where `clip` is a mapping, `grad_norm/NAME` for
    each group. NAME is the pattern without a leading `^` and trailing `/`: `grad_norm/policy` for `^policy/`.

    Raises:
      UserError: a pattern of `clip` matches no path, or two match the same one.
    """
    norm = global_norm(grads)
    metrics: Sums = {"grad_norm": Sum.of(norm), "grad_norm_max": Max(norm)}
    if clip is None:
        return grads, norm, metrics
    if not isinstance(clip, Mapping):
        return _scaled(grads, norm, clip), norm, metrics
    leaves, structure = jax.tree.flatten(grads)
    groups = groups_of([path for path, _ in named_leaves(grads)], clip)
    names = [group_name(group) for group in groups]
    for name, (group, members) in zip(names, groups.items(), strict=True):
        own = global_norm([leaves[at] for at in members])
        metrics[f"grad_norm/{name if names.count(name) == 1 else group}"] = Sum.of(own)
        if group in clip:
            for at in members:
                leaves[at] = _scaled(leaves[at], own, clip[group])
    return jax.tree.unflatten(structure, leaves), norm, metrics


def groups_of(paths: list[str], clip: Mapping[str, float]) -> dict[str, list[int]]:
    """Returns the positions of the paths that each pattern matches, and under `default` those that none matches.

    Raises:
      UserError: a pattern matches no path, or two match the same one.
    """
    patterns = [pattern for pattern in clip if pattern != DEFAULT]
    groups: dict[str, list[int]] = {pattern: [] for pattern in patterns}
    rest: list[int] = []
    for at, path in enumerate(paths):
        found = [pattern for pattern in patterns if re.search(pattern, path)]
        if len(found) > 1:
            raise UserError(f"optimizer.clip: {path} is matched by {found[0]!r} and by {found[1]!r}")
        (groups[found[0]] if found else rest).append(at)
    for pattern, members in groups.items():
        if not members:
            raise UserError(
                f"optimizer.clip: {pattern!r} matches no trained parameter (there are: {', '.join(paths[:12])}, ...)"
            )
    return groups | ({DEFAULT: rest} if rest else {})


def group_name(pattern: str) -> str:
    """Returns the name of a pattern's group in metrics: `policy` for `^policy/`."""
    return pattern.removeprefix("^").rstrip("/$") or pattern


def _scaled(grads: PyTree, norm: Float[Array, ""], most: float) -> PyTree:
    """Scales gradients whose norm is `norm` down to the norm `most` where it is larger."""
    scale = most / jnp.maximum(norm, most)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
