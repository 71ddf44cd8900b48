"""Splitting frozen leaves off and joining them again."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.core.state import State, join, split

TREE = {
    "item": {"embedding": 1},
    "block_0": {"attention": {"kernel": 2, "bias": 3}, "norm": {"scale": 4}},
    "head": {"kernel": 5},
}


@pytest.mark.parametrize(
    ("frozen", "held"),
    [
        ((), set()),
        (("^item/",), {"item/embedding"}),
        (("kernel$", "scale"), {"block_0/attention/kernel", "block_0/norm/scale", "head/kernel"}),
        (("block_0",), {"block_0/attention/kernel", "block_0/attention/bias", "block_0/norm/scale"}),
    ],
)
def test_split_and_join(frozen, held):
    trainable, kept = split(TREE, frozen)
    assert {name for name, _ in named_leaves(kept)} == held
    assert {name for name, _ in named_leaves(trainable)} == {name for name, _ in named_leaves(TREE)} - held
    assert join(trainable, kept) == TREE


def test_nothing_empty_is_left_behind():
    trainable, kept = split(TREE, ("block_0",))
    assert set(trainable) == {"item", "head"} and set(kept) == {"block_0"}


trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))


@settings(max_examples=60, deadline=None)
@given(tree=trees, data=st.data())
def test_round_trip_of_any_tree(tree, data):
    names = [name for name, _ in named_leaves(tree)]
    chosen = data.draw(st.lists(st.sampled_from(names), max_size=len(names) - 1, unique=True))
    patterns = tuple(f"^{name}$" for name in chosen)
    trainable, kept = split(tree, patterns)
    assert {name for name, _ in named_leaves(kept)} == set(chosen)
    assert join(trainable, kept) == join(kept, trainable) == tree


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("^itm/",), r"optimizer.frozen: '\^itm/' matches no parameter \(there are: .*head/kernel"),
        (("kernel", "embeding"), "'embeding' matches no parameter"),
        (("",), "leaves nothing to train"),
    ],
)
def test_patterns_that_cannot_be(frozen, message):
    with pytest.raises(UserError, match=message):
        split(TREE, frozen)


def test_a_state_is_a_tree():
    state = State({"w": np.ones(2)}, {}, {}, (), {"ema": {"w": np.zeros(2)}}, np.int32(3), np.int32(5))
    doubled = jax.tree.map(lambda x: 2 * x, state)
    assert isinstance(doubled, State) and doubled.step == 6
    assert [name for name, _ in named_leaves(state)] == ["params/w", "extra/ema/w", "step", "updates"]
