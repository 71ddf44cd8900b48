"""Rows of tokens: packed and alone they hold the same, at any cursor, batch size and process."""

import collections
import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.loader import Loader, build_batches
from jaxops.data.text.documents import Documents
from jaxops.data.text.mixture import Interleaving, Mixture
from jaxops.data.text.source import PART_ROW, TextBatches, TextRows, TextSource, fit

FILL = 1
"""An id that documents use too, as an end token that is also the padding."""


def documents(lengths, seed=0):
    """Documents of these lengths with random ids and masks."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return Documents(rng.integers(0, 4, total).astype(np.int32), rng.random(total) < 0.6, offsets)


def rows_of(found, length, packed, too_long="split", seed=0):
    with notes.collected():
        segments = fit(found, length, too_long)
    return TextRows(found, segments, length, packed=packed, seed=seed, fill=FILL)


def multiset(rows):
    """(document-free) triples of every place of every row, and their number."""
    batch = rows.batch(np.arange(len(rows)))
    real = batch["segment"] > 0
    return collections.Counter(
        zip(*(batch[name][real].tolist() for name in ("tokens", "targets", "mask")), strict=True)
    )


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30)


@given(lengths=LENGTHS, length=st.integers(2, 20), too_long=st.sampled_from(["split", "cut_end", "cut_start", "drop"]))
def test_packed_rows_hold_what_rows_of_one_segment_hold(lengths, length, too_long):
    found = documents(lengths)
    try:
        alone = rows_of(found, length, False, too_long)
    except UserError as error:
        assert "no example has anything to learn from" in str(error)
        return
    packed = rows_of(found, length, True, too_long)
    assert multiset(packed) == multiset(alone) and len(packed) <= len(alone)


@given(lengths=LENGTHS, length=st.integers(2, 20))
def test_split_documents_are_learnt_from_exactly_once(lengths, length):
    found = documents(lengths)
    expected = collections.Counter()
    for begin, end in zip(found.offsets, found.offsets[1:], strict=False):
        for at in range(begin, end - 1):
            if found.trained[at + 1]:
                expected[found.tokens[at], found.tokens[at + 1], 1.0] += 1
    if not expected:
        return
    learnt = multiset(rows_of(found, length, True))
    assert {key: count for key, count in learnt.items() if key[2]} == expected


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_in_a_row(packed):
    found = documents([9, 5, 30, 2, 1, 0, 12, 7], seed=3)
    rows = rows_of(found, 16, packed)
    batch = rows.batch(np.arange(len(rows)))
    assert {name: values.dtype.name for name, values in batch.items()} == {
        "id": "int32",
        "weight": "float32",
        "tokens": "int32",
        "targets": "int32",
        "mask": "float32",
        "segment": "int32",
        "position": "int32",
    }
    for row in range(len(rows)):
        segment, position = batch["segment"][row], batch["position"][row]
        held = int((segment > 0).sum())
        assert (segment[:held] > 0).all() and (np.diff(segment[:held]) >= 0).all()
        assert set(segment[:held].tolist()) == set(range(1, segment.max() + 1))
        for number in range(1, segment.max() + 1):
            at = np.flatnonzero(segment == number)
            assert position[at].tolist() == list(range(len(at)))
            # a target is the next token of the same segment, also where ids equal the padding
            assert batch["targets"][row, at[:-1]].tolist() == batch["tokens"][row, at[1:]].tolist()
            assert batch["mask"][row, at].any()
        assert (batch["tokens"][row, held:] == FILL).all() and not batch["mask"][row, held:].any()
    if packed:
        assert rows.filled > 0.7


@pytest.mark.parametrize("packed", [True, False])
def test_any_cut_of_the_stream_gives_the_same_rows(packed):
    found = documents([5 + at % 23 for at in range(60)])
    source = TextSource(rows_of(found, 24, packed), seed=7)
    whole = source.batch(0, 3 * source.examples)
    again = TextSource(rows_of(documents([5 + at % 23 for at in range(60)]), 24, packed), seed=7)
    for size in (1, 5, source.examples):
        parts = [again.batch(at, size) for at in range(0, 2 * size + 1, size)]
        for name, values in whole.items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), values[: 3 * size]), name
    for epoch in range(3):
        part = whole["id"][epoch * source.examples : (epoch + 1) * source.examples]
        assert sorted(part.tolist()) == list(range(source.examples))
    assert whole["id"][: source.examples].tolist() != whole["id"][source.examples : 2 * source.examples].tolist()


def test_processes_that_hold_parts_of_a_batch_build_the_whole():
    """Each process opens the data itself and builds the rows of its devices, which need not be neighbours."""
    lengths = [5 + at % 23 for at in range(60)]
    open_one = lambda: TextSource(rows_of(documents(lengths), 24, True), seed=1)
    whole = open_one().batch(8, 8)
    held = [[(0, 2), (6, 8)], [(2, 3), (5, 6)], [(3, 5)]]
    built = [build_batches(open_one(), 8, 8, rows) for rows in held]
    place = np.concatenate([np.arange(start, stop) for rows in held for start, stop in rows])
    for name, values in whole.items():
        assert np.array_equal(np.concatenate([part[name] for part in built]), values[place]), name


def test_the_loader_resumes_at_a_cursor():
    source = TextSource(rows_of(documents([20] * 30), 24, True), seed=1)
    with Loader(source, 0, 4) as straight, Loader(source, 8, 4) as resumed:
        batches = [next(straight) for _ in range(4)]
        for batch in batches[2:]:
            other = next(resumed)
            assert all(np.array_equal(batch[name], other[name]) for name in batch)


@pytest.mark.parametrize("packed", [True, False])
def test_evaluation_reads_every_row_once_and_pads_without_weight(packed):
    rows = rows_of(documents([5 + at % 23 for at in range(60)]), 24, packed)
    batches = TextBatches(rows, 7)
    assert len(batches) == -(-len(rows) // 7)
    seen = list(batches)
    place = np.concatenate([batch[PART_ROW] for batch in seen])
    assert place[place >= 0].tolist() == list(range(len(rows)))
    expected = sum(count for (_, _, mask), count in multiset(rows).items() if mask)
    assert sum(batch["mask"].sum() for batch in seen) == expected
    last = seen[-1]
    assert not last["segment"][last[PART_ROW] < 0].any()
    half = batches.rows(len(batches) - 1, 2, 5)
    assert all(np.array_equal(half[name], last[name][2:5]) for name in last)


def test_what_cutting_loses_is_told_and_nothing_is_an_error():
    found = Documents(np.arange(60, dtype=np.int32), np.arange(60) >= 45, np.array([0, 20, 60]))
    with notes.collected() as told:
        kept = fit(found, 30, "cut_end", "train")
    assert (kept.begin.tolist(), kept.width.tolist()) == ([20], [30])
    assert "train: 1 of 2 examples are longer than data.length 30 and lose their end: 9 of 15 tokens" in told[0]
    assert "train: 1 example(s) have nothing left to learn from" in told[1]
    with notes.collected() as told:
        fit(found, 30, "cut_start")
    assert "lose their beginning: 0 of 15 tokens" in told[0]
    with pytest.raises(UserError, match=r"no example has anything to learn from within data.length 8; .* 40 tokens"):
        fit(found, 8, "cut_end")


def mixture(seed=0):
    sources = []
    for at, count in enumerate((11, 40, 7)):
        rows = rows_of(documents([20 + at] * count, seed=at), 24, False)
        sources.append(TextSource(rows, seed + at))
    return Mixture(sources, (1.0, 2.5, 0.5), seed)


def test_one_cursor_resumes_a_mixture_with_a_cursor_each():
    mixed, again = mixture(), mixture()
    whole = mixed.batch(0, 700)
    for start, size in ((0, 1), (3, 64), (255, 2), (511, 100), (699, 1)):
        part = again.batch(start, size)
        assert all(np.array_equal(part[name], whole[name][start : start + size]) for name in whole)
    for cursor in (0, 1, 255, 256, 613):
        drawn = np.bincount(whole["source"][:cursor], minlength=3)
        assert mixed.cursors(cursor) == drawn.tolist()
    # each source runs through its own epochs, all its rows once before any again
    for number, (first, count) in enumerate(((0, 11), (11, 40), (51, 7))):
        own = whole["id"][whole["source"] == number]
        assert sorted(own[:count].tolist()) == list(range(first, first + count))
    assert mixture(seed=1).batch(0, 64)["source"].tolist() != whole["source"][:64].tolist()


@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    cursor=st.integers(0, 10**12),
    seed=st.integers(0, 2**31),
)
def test_shares_are_exact_at_any_cursor(weights, cursor, seed):
    mixing = Interleaving(weights, seed)
    counts = mixing.drawn(cursor)
    assert counts.sum() == cursor and (counts >= 0).all()
    share = np.array(weights) / sum(weights)
    assert (np.abs(counts - cursor * share) <= mixing.block + cursor * 1e-11).all()
    steps = np.bincount(mixing.sources(cursor, 50), minlength=len(weights))
    assert (mixing.drawn(cursor + 50) - counts).tolist() == steps.tolist()
    whole = cursor - cursor % mixing.block
    assert (np.abs(mixing.drawn(whole) - whole * share) <= 2 + whole * 1e-11).all()


@pytest.mark.parametrize("weights", [[1.0, 1e-9], [1e-310, 1e10], [1e308, 5e-324]])
def test_a_weight_that_would_never_be_drawn_is_refused(weights):
    with pytest.raises(UserError, match="too little to draw from"):
        Interleaving(weights, 0)


@pytest.mark.parametrize("scale", [1e308, 1e-310, 2.0**-1074])
def test_weights_of_any_size_are_shares(scale):
    drawn = lambda *weights: Interleaving(weights, 0).drawn(10**6 + 7).tolist()
    assert drawn(scale, scale) == drawn(1.0, 1.0)
    if scale > 1e-300:
        assert drawn(scale, scale / 2) == drawn(2.0, 1.0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_weight_is_refused(weight):
    for weights in ([weight, 1.0], [1.0, weight]):
        with pytest.raises(UserError, match="expected finite weights above zero"):
            Interleaving(weights, 0)


def test_a_prompt_that_fills_pieces_of_its_example_leaves_nothing_out():
    """Of three examples, one learns from its last piece alone, one from nothing, and one is too short for a piece."""
    found = Documents(np.arange(61, dtype=np.int32), np.arange(61) == 39, np.array([0, 40, 60, 61]))
    with notes.collected() as told:
        kept = fit(found, 10, "split")
    assert kept.begin.tolist() == [30] and told == ["1 example(s) have nothing left to learn from and are left out"]
    whole = Documents(found.tokens[:40], found.trained[:40], np.array([0, 40]))
    with notes.collected() as told:
        fit(whole, 10, "split")
    assert not told


def test_widths_are_packed_tightly_at_real_lengths():
    lengths = np.random.default_rng(0).integers(20, 1500, 4000)
    rows = rows_of(documents(lengths.tolist()), 1024, True)
    assert rows.filled > 0.97


def test_bad_cursors():
    for source in (mixture(), TextSource(rows_of(documents([20] * 3), 24, True), seed=1)):
        for call in (functools.partial(source.batch, -1, 2), functools.partial(source.batch, 0, 0)):
            with pytest.raises(ValueError, match="cursor >= 0"):
                call()
