"""Packing: every transition once, nothing beyond a row, and the loss of packed rows is that of the windows alone."""

import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.data.interactions.interactions import from_arrays
from jaxops.data.interactions.packing import PackedSource
from jaxops.data.interactions.splits import leave_one_out
from jaxops.data.packing import best_fit, longest_that_fits


def interactions(users=50, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest, users)
    user = np.repeat(np.arange(users), lengths)
    item = rng.integers(1, 40, len(user))
    return from_arrays(user, item, np.arange(len(user)))


@pytest.mark.parametrize("length", [1, 5, 8, 50])
@pytest.mark.parametrize("pack", [longest_that_fits, best_fit])
def test_every_window_is_in_one_row_and_rows_hold(length, pack):
    width = np.random.default_rng(1).integers(1, length + 1, 300)
    windows, first = pack(width, length, seed=3)
    assert sorted(windows) == list(range(300))
    sums = np.add.reduceat(width[windows], first[:-1])
    assert sums.max() <= length
    # no two rows could be one: the fuller half of them is nearly full
    assert len(sums) <= 1.15 * width.sum() / length + 1


def test_best_fit_fills_rows_with_many_short_histories():
    """Most users of a shop have few events: there are not enough long histories for each of them to fill up."""
    length = np.concatenate([np.full(900, 5), np.full(80, 6), np.full(20, 40)])
    user = np.repeat(np.arange(len(length)), length)
    inter = from_arrays(user, np.random.default_rng(0).integers(1, 40, len(user)), np.arange(len(user)))
    source = PackedSource(inter, leave_one_out(inter), 50, seed=0, pack=best_fit)
    targets = int((length - 3).sum())
    assert source.batch(0, source.examples)["weight"].sum() == targets
    assert source.examples == -(-targets // 50)


def test_every_transition_is_a_target_once_an_epoch():
    inter = interactions()
    split = leave_one_out(inter)
    source = PackedSource(inter, split, 8, seed=1)
    want = sorted(
        (int(inter.item[at]), int(inter.item[at + 1]))
        for user in range(inter.n_users)
        for at in range(inter.offsets[user], inter.offsets[user] + split.train_end[user] - 1)
    )
    for epoch in (0, 3):
        batch = source.batch(epoch * source.examples, source.examples)
        real = batch["weight"] > 0
        assert sorted(zip(batch["items"][real].tolist(), batch["targets"][real].tolist(), strict=True)) == want
        assert (batch["items"][~real] == 0).all() and (batch["targets"][~real] == 0).all()
        assert sorted(batch["id"]) == list(range(source.examples))


def test_a_batch_is_a_function_of_the_cursor_across_epochs():
    source = PackedSource(interactions(), leave_one_out(interactions()), 8, seed=1)
    for cursor in (0, source.examples - 3, 5 * source.examples - 1):
        whole = source.batch(cursor, 12)
        parts = [source.batch(cursor, 5), source.batch(cursor + 5, 7)]
        for name, values in whole.items():
            np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))


def test_segments_keep_the_positions_of_windows_alone():
    batch = PackedSource(interactions(), leave_one_out(interactions()), 8, seed=1).batch(0, 10)
    for segment, position in zip(batch["segment"], batch["position"], strict=True):
        for one in range(1, segment.max() + 1):
            at = np.flatnonzero(segment == one)
            assert (np.diff(at) == 1).all()
            np.testing.assert_array_equal(position[at], np.arange(8 - len(at), 8))


def test_nobody_to_learn_from():
    inter = from_arrays([1, 1, 1, 2, 2, 2], [1, 2, 3, 1, 2, 3], range(6))  # one training event each
    with pytest.raises(UserError, match="two training events"):
        PackedSource(inter, leave_one_out(inter), 8, seed=0)


def test_packed_loss_and_gradients_are_those_of_the_windows_alone():
    import jax

    from jaxops.models.sasrec import SASRec, SASRecConfig
    from jaxops.objectives import ranking

    inter = interactions(users=12)
    split = leave_one_out(inter)
    model = SASRec(SASRecConfig(dim=8, length=8, layers=1, heads=2, dropout=0.0), inter.n_items)
    params = model.init(jax.random.key(0))
    source = PackedSource(inter, split, 8, seed=1)
    packed = source.batch(0, source.examples)
    alone = {name: [] for name in ("items", "targets", "weight")}
    for row in range(source.examples):
        for one in range(1, packed["segment"][row].max() + 1):
            at = np.flatnonzero(packed["segment"][row] == one)
            for name in alone:
                alone[name].append(np.concatenate([np.zeros(8 - len(at), packed[name].dtype), packed[name][row, at]]))
    single = {name: np.stack(rows) for name, rows in alone.items()}
    single["id"] = np.arange(len(single["items"]), dtype=np.int32)

    def loss(params, batch):
        return ranking.softmax(model)(params, batch, None)["loss/softmax"].total

    a, b = (jax.jit(jax.value_and_grad(loss))(params, batch) for batch in (packed, single))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
