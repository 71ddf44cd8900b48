"""Conversion of any pytree to {path: leaf} and to nested dicts, so that stored trees can be read without our classes.

A path is a tuple of dict keys, attribute names (str) and positions (int): `State(params={"w": x}, ...)` gives
("params", "w"), an optax chain ("opt_state", 0, "mu", "w"). Tested in tests/core/test_checkpoint_plain.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

Path = tuple[str | int, ...]


def name(path: Path) -> str:
    """Joins the parts of a path by slashes: `params/layers/0/w`."""
    return "/".join(str(part) for part in path)


def flatten(tree: Any) -> dict[Path, Any]:
    """Returns the leaves by path, in the order of `jax.tree.leaves`; empty containers and None are dropped.

    Raises:
      ValueError: two leaves have the same name once "." and "/" are taken as the same separator, so that one would
        replace the other in a file.
    """
    leaves = {tuple(_part(key) for key in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    seen: dict[str, Path] = {}
    for path in leaves:
        stored = name(path).replace(".", "/")
        if stored in seen:
            raise ValueError(f"two leaves share the name {stored!r}: {seen[stored]} and {path}")
        seen[stored] = path
    if len(seen) != len(jax.tree.leaves(tree)):
        raise ValueError("two leaves share a path")
    return leaves


def dtype(leaf: Any) -> Any:
    """Returns the dtype of an array, abstract or not, or of a number."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def nest(leaves: Mapping[Path, Any], key: Callable[[str | int], Any] = lambda part: part) -> Any:
    """Returns nested dicts of `leaves`, with `key` applied to every key; for an empty path the leaf itself."""
    if () in leaves:
        return leaves[()]
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(key(part), {})
        node[key(path[-1])] = leaf
    return tree


def _part(key: Any) -> str | int:
    match key:
        case DictKey(key=part) | FlattenedIndexKey(key=part):
            return part if isinstance(part, int) and not isinstance(part, bool) else str(part)
        case SequenceKey(idx=part):
            return part
        case GetAttrKey(name=part):
            return part
    return str(key)
