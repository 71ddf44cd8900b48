"""Trees to paths and back to nested dicts."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxops.core import plain


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    params: Any
    opt_state: Any


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Opaque:
    """Registered without keys, so its children are numbered."""

    inside: Any

    def tree_flatten(self):
        return (self.inside,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_paths_of_dicts_dataclasses_tuples_and_named_tuples():
    tree = Box({"layers": {0: {"w": 1}}, "b": None}, (Pair(2, {}), [3, Opaque(4)]))
    assert plain.flatten(tree) == {
        ("params", "layers", 0, "w"): 1,
        ("opt_state", 0, "left"): 2,
        ("opt_state", 1, 0): 3,
        ("opt_state", 1, 1, 0): 4,
    }


def test_the_order_is_that_of_the_leaves():
    tree = {"b": 1, "a": {"z": 2, "y": 3}}
    assert list(plain.flatten(tree).values()) == jax.tree.leaves(tree)


def test_names():
    assert plain.name(("params", "layers", 0, "w")) == "params/layers/0/w"


def test_nesting():
    leaves = {("params", "layers", 0, "w"): 1, ("params", "b"): 2, ("step",): 3}
    assert plain.nest(leaves) == {"params": {"layers": {0: {"w": 1}}, "b": 2}, "step": 3}
    assert plain.nest(leaves, key=str) == {"params": {"layers": {"0": {"w": 1}}, "b": 2}, "step": 3}
    assert plain.nest({(): 7}) == 7
    assert plain.nest({}) == {}


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": 1, "a": {"b": 2}},
        {"a/b": 1, "a": {"b": 2}},
        {"a": {"b.c": 1}, "a.b": {"c": 2}},
    ],
)
def test_leaves_that_would_share_a_name_when_stored_are_refused(tree):
    """Orbax joins keys with dots, and silently keeps one of two equal names."""
    with pytest.raises(ValueError, match="share the name 'a/b"):
        plain.flatten(tree)


def test_a_single_array_has_the_empty_path():
    assert list(plain.flatten(np.zeros(3))) == [()]
