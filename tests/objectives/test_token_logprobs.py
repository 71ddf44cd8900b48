"""Logprobs in chunks against full logits in numpy float64, on every mesh; what the compiled program never forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_text import of_kind, operations
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy_language import numpy_scores
from toys import mesh_of

from jaxops.core.mesh import batch_axes
from jaxops.objectives.token_logprobs import LOGITS_AT_ONCE, token_logprobs

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
SHAPES = [
    {},
    {"soft_cap": 3.0},
    {"temperature": 0.7},
    {"chunk": 1},
    {"chunk": 4, "soft_cap": 2.0, "temperature": 1.3},
    {"chunk": 10**6},
]


def given(batch=2, length=5, dim=4, rows=128, real_vocab=101, seed=0):
    """Hidden states, a head and targets; the first and last tokens are among the targets."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, real_vocab, (batch, length)).astype(np.int32)
    targets[0, :2] = 0, real_vocab - 1
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return draw(batch, length, dim), draw(dim, rows), jnp.asarray(targets)


def numpy_gradients(hidden, head, targets, weights, **options):
    """Gradients of the weighted sum of the first four scores, by central differences in float64, entry by entry."""

    def total(hidden, head):
        scores = numpy_scores(hidden, head, np.asarray(targets), **options)[:4]
        return sum((w * s).sum() for w, s in zip(weights, scores, strict=True))

    targets, at = np.asarray(targets), [np.asarray(x, np.float64) for x in (hidden, head)]
    out = [np.zeros_like(x) for x in at]
    for x, grad in zip(at, out, strict=True):
        for place in np.ndindex(x.shape):
            old, ends = x[place], []
            for step in (1e-5, -1e-5):
                x[place] = old + step
                ends.append(total(*at))
            x[place] = old
            grad[place] = (ends[0] - ends[1]) / 2e-5
    return out


def weights_of(shape, seed=1):
    """A weight for each position of logprobs, entropies, log-sums and mean logprobs."""
    return np.random.default_rng(seed).normal(size=(4, *shape)).astype(np.float32)


def total_of(hidden, head, targets, weights, **options):
    scores = token_logprobs(hidden, head, targets, **options)[:4]
    return sum(jnp.sum(w * s) for w, s in zip(weights, scores, strict=True))


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_values_and_gradients_are_numpys(options):
    hidden, head, targets = given()
    weights = weights_of(targets.shape)
    exact = {name: value for name, value in options.items() if name != "chunk"} | {"real_vocab": 101}
    run = functools.partial(token_logprobs, real_vocab=101, **options)
    expected = numpy_scores(hidden, head, np.asarray(targets), **exact)
    for name, mine, theirs in zip(
        run(hidden, head, targets)._fields, run(hidden, head, targets), expected, strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=2e-6, err_msg=name)
    grads = jax.grad(functools.partial(total_of, real_vocab=101, **options), (0, 1))(hidden, head, targets, weights)
    for mine, theirs in zip(grads, numpy_gradients(hidden, head, targets, weights, **exact), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6 * np.abs(theirs).max())
    np.testing.assert_array_equal(grads[1][:, 101:], 0)


def test_large_logits_stay_exact():
    hidden, head, targets = given()
    scores = token_logprobs(1e3 * hidden, head, targets, real_vocab=101)
    expected = numpy_scores(1e3 * hidden, head, np.asarray(targets), 101)
    np.testing.assert_allclose(scores.logprobs, expected[0], rtol=1e-6, atol=2e-3)
    np.testing.assert_allclose(scores.entropy, expected[1], atol=2e-3)
    assert np.all(np.asarray(scores.entropy) >= 0)


def test_the_best_of_equal_tokens_is_the_first():
    hidden, head, targets = given()
    scores = token_logprobs(0 * hidden, head, targets, real_vocab=101)
    np.testing.assert_array_equal(scores.best, 0)
    np.testing.assert_allclose(scores.entropy, np.log(101), rtol=1e-6)


@pytest.mark.parametrize("target", [-100, 101, 127, 500])
def test_a_target_outside_the_vocabulary_is_nan_and_harmless_without_weight(target):
    hidden, head, targets = given()
    outside = targets.at[1, 2].set(target)
    run = functools.partial(token_logprobs, real_vocab=101)
    found = np.isnan(run(hidden, head, outside).logprobs)
    assert found.sum() == 1 and found[1, 2]
    weight = np.ones(targets.shape, np.float32)
    weight[1, 2] = 0

    def loss(hidden, head, targets):
        return jnp.sum(jnp.where(weight != 0, run(hidden, head, targets).logprobs, 0.0) * weight)

    for mine, theirs in zip(
        jax.grad(loss, (0, 1))(hidden, head, outside), jax.grad(loss, (0, 1))(hidden, head, targets), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_what_cannot_be():
    hidden, head, targets = given()
    for options in ({"real_vocab": 129}, {"real_vocab": 0}):
        with pytest.raises(ValueError, match="the head has 128 columns"):
            token_logprobs(hidden, head, targets, **options)
    for options in ({"chunk": 0}, {"temperature": 0.0}, {"soft_cap": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            token_logprobs(hidden, head, targets, real_vocab=101, **options)


def on_mesh(layout, hidden, head, targets, run):
    """`run` of arrays that lie as a step's do: tokens over the batch axes, the head over fsdp and tensor."""
    mesh = mesh_of(**layout)
    tokens = P(batch_axes(mesh))
    spec = P(*(axis if layout.get(axis, 1) > 1 else None for axis in ("fsdp", "tensor")))
    specs = [tokens, spec, tokens, P(None, batch_axes(mesh))]
    with jax.set_mesh(mesh):
        args = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((hidden, head, targets), specs, strict=False)]
        return jax.jit(jax.sharding.auto_axes(run, out_sharding=P())), args, mesh


slow = lambda **layout: pytest.param(layout, marks=pytest.mark.slow)
LAYOUTS = [
    {"data": 8},
    CUBE,
    {"data": 2, "sequence": 2, "tensor": 2},
    slow(fsdp=8),
    slow(tensor=2),
    slow(sequence=2),
    slow(replica=2, fsdp=4),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_mesh_gives_the_numbers_of_one_device(layout):
    hidden, head, targets = given(batch=8, length=6, dim=8, rows=256, real_vocab=200)
    weights = weights_of(targets.shape)
    options = {"real_vocab": 200, "chunk": 4, "soft_cap": 5.0}

    def run(hidden, head, targets):
        grads = jax.grad(functools.partial(total_of, **options), (0, 1))(hidden, head, targets, weights)
        return token_logprobs(hidden, head, targets, **options), grads

    one = run(hidden, head, targets)
    jitted, args, mesh = on_mesh(layout, hidden, head, targets, run)
    with jax.set_mesh(mesh):
        found = jax.device_get(jitted(*args))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6 * np.abs(theirs).max())


def test_under_explicit_axes_and_for_an_odd_batch():
    hidden, head, targets = given(batch=8)
    expected = token_logprobs(hidden, head, targets, real_vocab=101)
    run = jax.jit(functools.partial(token_logprobs, real_vocab=101, chunk=4))
    with jax.set_mesh(mesh_of(**CUBE)):
        whole = run(hidden, head, targets)
        odd = run(hidden[:3], head, targets[:3])
    for mine, part, theirs in zip(whole, odd, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
        np.testing.assert_allclose(part, theirs[:3], rtol=1e-5)


def test_in_bfloat16_logits_are_float32_and_the_heads_gradient_adds_up_in_it():
    """4,096 chunks of one token each, all alike: a bfloat16 sum would stop growing at 256 times its addend."""
    hidden = np.full((4, 1024, 2), 0.5, np.float32)
    head = np.zeros((2, 128), np.float32)
    targets = jnp.zeros((4, 1024), jnp.int32)
    small = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head)]
    loss = lambda hidden, head: -jnp.sum(token_logprobs(hidden, head, targets, real_vocab=128, chunk=1).logprobs)
    total, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(*small)
    assert total.dtype == jnp.float32 and {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(total, 4096 * np.log(128), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(grads[1][:, 0], np.float32), 4096 * 0.5 * (1 / 128 - 1), rtol=2**-8)
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 5, 16), (16, 128)))
    targets = jnp.asarray(rng.integers(0, 128, (2, 5)), jnp.int32)
    found = token_logprobs(hidden, head, targets, real_vocab=128)
    for mine, theirs in zip(found, numpy_scores(hidden, head, np.asarray(targets), 128), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)  # products of bfloat16 are exact in float32
    mixed = token_logprobs(hidden, head.astype(jnp.float32), targets, real_vocab=128)
    np.testing.assert_allclose(mixed.logprobs, found.logprobs, rtol=1e-5)


def compiled(layout, chunk, batch, length, dim, rows):
    """The compiled gradient of a mean of logprobs, and the sizes of one device's shares."""
    hidden, head, targets = given(batch, length, dim, rows, rows)

    def run(hidden, head, targets):
        loss = lambda hidden, head: (
            -jnp.sum(token_logprobs(hidden, head, targets, real_vocab=rows, chunk=chunk).logprobs)
        )
        return jax.value_and_grad(loss, (0, 1))(hidden, head)

    jitted, args, mesh = on_mesh(layout, hidden, head, targets, run)
    with jax.set_mesh(mesh):
        return jitted.lower(*args).compile().as_text()


@pytest.mark.latest
@pytest.mark.parametrize("layout", [{"data": 1}, {"data": 8}, CUBE], ids=str)
def test_no_program_holds_logits_of_all_tokens_or_moves_the_head_in_the_loop(layout):
    batch, length, dim, rows, chunk = 16, 64, 8, 512, 16
    text = compiled(layout, chunk, batch, length, dim, rows)
    ways, tensor = layout.get("data", 1) * layout.get("fsdp", 1), layout.get("tensor", 1)
    ops = operations(text)
    assert any(op.loop for op in ops if op.kind == "dot"), "the loop over chunks was unrolled away"
    logits = batch * length * rows // (ways * tensor)
    allowed = max(chunk * rows // tensor, batch * length * dim, dim * rows)
    assert max(op.largest for op in ops) <= allowed < logits
    collectives = of_kind(text, "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    assert all(op.largest <= chunk * dim for op in collectives if op.loop), "the head is moved in every iteration"
    reduced = [
        op for op in collectives if op.kind in ("all-reduce", "reduce-scatter") and op.largest >= dim * rows // 2
    ]
    assert len(reduced) == (0 if ways == 1 else 1)


def test_the_chunk_is_chosen_by_the_size_of_the_vocabulary():
    from jaxops.objectives.token_logprobs import _chunks, _Form

    form = _Form(128_256, None, 1.0, None)
    count, size = _chunks(form, 8192, 128_256)
    assert size * 128_256 <= LOGITS_AT_ONCE < 2 * size * 128_256 and count * size >= 8192
    assert _chunks(form, 48, 256) == (1, 48)
    with jax.sharding.use_abstract_mesh(mesh_of(tensor=2).abstract_mesh):
        assert _chunks(form, 8192, 128_256)[1] > 1.9 * size
