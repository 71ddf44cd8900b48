"""Each optimizer against optax as its authors wrote it, on one device and on eight; schedules by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from toys import host, rows, trainer

from jaxops.core.compiles import Compiles
from jaxops.core.failures import UserError
from jaxops.core.optimizer import (
    Adafactor,
    AdamW,
    Common,
    Constant,
    Linear,
    Lion,
    Muon,
    Sgd,
    WarmupCosine,
    Wsd,
    build_optimizer,
    build_schedule,
)
from jaxops.core.sharding import named_leaves

LR, DECAY = 0.01, 0.1
RNG = np.random.default_rng(0)
PARAMS = {
    "embedding": RNG.normal(size=(6, 8)).astype(np.float32),
    "up": {"kernel": RNG.normal(size=(8, 20)).astype(np.float32), "bias": RNG.normal(size=20).astype(np.float32)},
    "norm": {"scale": RNG.normal(size=8).astype(np.float32)},
}
GRADS = [jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), PARAMS) for _ in range(3)]
DECAYED = {"embedding": True, "up": {"kernel": True, "bias": False}, "norm": {"scale": False}}


def after_three(tx):
    """Parameters after three updates with fixed gradients."""

    @jax.jit
    def update(grads, state, params):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
            return state, optax.apply_updates(params, updates)

    with jax.numpy_dtype_promotion("standard"):
        params, state = PARAMS, tx.init(PARAMS)
    for grads in GRADS:
        state, params = update(grads, state, params)
    return jax.device_get(params)


def muon_reference():
    """optax's Muon for matrices that are no embeddings; AdamW with a learning rate of its own for the rest."""
    numbers = lambda params: {
        "embedding": None,
        "up": {"kernel": contrib.MuonDimensionNumbers(0, 1), "bias": None},
        "norm": {"scale": None},
    }
    matrices = contrib.muon(
        LR, beta=0.9, weight_decay=DECAY, weight_decay_mask=DECAYED, muon_weight_dimension_numbers=numbers
    )
    rest = optax.adamw(LR / 4, weight_decay=DECAY, mask=DECAYED)
    found, others = after_three(matrices), after_three(rest)
    return others | {"up": {"kernel": found["up"]["kernel"], "bias": others["up"]["bias"]}}


MUON = Muon(lr=LR, weight_decay=DECAY, momentum=0.9, adam_lr=LR / 4)
REFERENCES = {
    "adamw": (AdamW(lr=LR, weight_decay=DECAY), lambda: optax.adamw(LR, weight_decay=DECAY, mask=DECAYED)),
    "adamw, plain": (AdamW(lr=LR, b1=0.8, b2=0.95, eps=1e-3), lambda: optax.adam(LR, 0.8, 0.95, 1e-3)),
    "lion": (Lion(lr=LR, weight_decay=DECAY), lambda: optax.lion(LR, weight_decay=DECAY, mask=DECAYED)),
    "sgd": (Sgd(lr=LR), lambda: optax.sgd(LR)),
    "momentum": (Sgd(lr=LR, momentum=0.9), lambda: optax.sgd(LR, 0.9)),
    "nesterov": (Sgd(lr=LR, momentum=0.9, nesterov=True), lambda: optax.sgd(LR, 0.9, nesterov=True)),
    "adafactor": (Adafactor(lr=LR), lambda: optax.adafactor(LR, multiply_by_parameter_scale=False)),
    "adafactor, factored": (
        Adafactor(lr=LR, min_factored=4),
        lambda: optax.adafactor(LR, 4, multiply_by_parameter_scale=False),
    ),
    "muon": (MUON, muon_reference),
}


@pytest.mark.latest
@pytest.mark.parametrize("name", REFERENCES)
def test_three_updates_are_optaxs(name):
    config, reference = REFERENCES[name]
    expected = reference()
    expected = after_three(expected) if isinstance(expected, tuple) else expected
    for (path, x), (_, y) in zip(
        named_leaves(after_three(build_optimizer(config, 10))), named_leaves(expected), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6, err_msg=path)


def test_adamw_is_numpys():
    """Three updates of decoupled decay and bias correction in float64."""
    found = after_three(build_optimizer(AdamW(lr=LR, weight_decay=DECAY), 10))
    for (path, x), (_, p), (_, decayed), *grads in zip(
        named_leaves(found), named_leaves(PARAMS), named_leaves(DECAYED), *map(named_leaves, GRADS), strict=True
    ):
        p, m, v = p.astype(np.float64), 0.0, 0.0
        for t, (_, g) in enumerate(grads, 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.astype(np.float64) ** 2
            step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            p = p - LR * (step + DECAY * decayed * p)
        np.testing.assert_allclose(x, p, rtol=1e-5, atol=1e-6, err_msg=path)


SHARDED = [
    AdamW(lr=LR, eps=1e-3),
    Lion(lr=1e-3),
    Sgd(lr=LR, momentum=0.9),
    Adafactor(lr=LR),
    Adafactor(min_factored=4),
    MUON,
]


@pytest.mark.latest
@pytest.mark.parametrize("config", SHARDED, ids=lambda c: c.kind)
def test_on_eight_devices_as_on_one_with_its_state_sharded(config):
    one, eight = (trainer(build_optimizer(config, 10), layout) for layout in ({"data": 1}, {"fsdp": 8}))
    compiles = Compiles()
    with compiles.watching():
        for seed in range(3):
            one.step(rows(seed))
            eight.step(rows(seed))
    assert compiles.count["train_step"] == 2
    # one sign flip of lion is two learning rates: allow none of those, only rounding
    for (path, x), (_, y) in zip(
        named_leaves(host(eight.state.params)), named_leaves(host(one.state.params)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=path)
    kernels = {path: x for path, x in named_leaves(eight.state.params) if path.endswith("kernel")}
    whole = [
        (path, leaf)
        for path, leaf in named_leaves(eight.state.opt_state)
        for name, kernel in kernels.items()
        if path.endswith(name) and leaf.shape == kernel.shape
    ]
    assert whole or config == Adafactor(min_factored=4) or (config.kind == "sgd" and not config.momentum)
    for path, leaf in whole:
        expected = next(k for name, k in kernels.items() if path.endswith(name)).sharding
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim) and not leaf.sharding.is_fully_replicated, path


def lr_at(plan, steps, *at, lr=2.0):
    schedule = build_schedule(Common(lr=lr, schedule=plan), steps)
    return [float(schedule(jnp.asarray(step))) for step in at]


def test_constant():
    assert lr_at(Constant(), 10, 0, 5, 9) == [2.0, 2.0, 2.0]


def test_warm_up_moves_at_once_and_ends_at_the_full_rate():
    found = lr_at(Constant(warmup=4), 10, 0, 1, 2, 3, 4, 9)
    np.testing.assert_allclose(found, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(lr_at(Constant(warmup=1), 10, 0, 1), [2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(lr_at(Linear(warmup=3), 3, 0, 1, 2), [2 / 3, 4 / 3, 2.0], rtol=1e-6)


def test_linear():
    np.testing.assert_allclose(lr_at(Linear(), 10, 0, 5, 9, 10), [2.0, 1.0, 0.2, 0.0], atol=1e-6)
    found = lr_at(Linear(warmup=2, end=0.1), 12, 1, 2, 7, 12)
    np.testing.assert_allclose(found, [2.0, 2.0, 2.0 - 0.5 * 1.8, 0.2], rtol=1e-5)


def test_warm_up_then_cosine():
    found = lr_at(WarmupCosine(warmup=2, end=0.1), 12, 0, 1, 2, 4, 7, 12)
    cosine = lambda t: 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * t / 10)))
    np.testing.assert_allclose(found, [1.0, 2.0, 2.0, cosine(2), cosine(5), 0.2], rtol=1e-5)


def test_warm_up_stable_decay():
    found = lr_at(Wsd(warmup=2, decay=0.25, end=0.5), 20, 0, 1, 2, 14, 15, 17, 19, 20)
    np.testing.assert_allclose(found, [1.0, 2.0, 2.0, 2.0, 2.0, 1.6, 1.2, 1.0], rtol=1e-5)


def test_a_decay_longer_than_what_the_warm_up_leaves_still_ends_where_it_should():
    found = lr_at(Wsd(warmup=6, decay=0.8, end=0.0), 10, 5, 6, 8, 10)
    np.testing.assert_allclose(found, [2.0, 2.0, 1.0, 0.0], atol=1e-6)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"optimizer\.schedule\.warmup: 11 steps, but the run has 10"):
        build_optimizer(AdamW(schedule=Linear(warmup=11)), 10)


def test_the_schedule_drives_the_updates():
    moved = after_three(build_optimizer(Sgd(lr=LR, schedule=Linear()), 4))
    rates = [LR, 0.75 * LR, 0.5 * LR]
    for (path, x), (_, p), *grads in zip(
        named_leaves(moved), named_leaves(PARAMS), *map(named_leaves, GRADS), strict=True
    ):
        expected = p - sum(rate * g.astype(np.float64) for rate, (_, g) in zip(rates, grads, strict=True))
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_learning_rate_multipliers():
    plain, scaled = (
        after_three(build_optimizer(Sgd(lr=LR, lr_multipliers=by), 10))
        for by in ({}, {"^up/": 0.5, "bias$": 0.0, "embedding": 3.0})
    )
    expected = {"embedding": 3.0, "up/kernel": 0.5, "up/bias": 0.0, "norm/scale": 1.0}
    for (path, x), (_, y), (_, p) in zip(*map(named_leaves, (scaled, plain, PARAMS)), strict=True):
        np.testing.assert_allclose(x - p, expected[path] * (y - p), rtol=1e-3, atol=2e-7, err_msg=path)


def test_the_rate_is_that_of_the_loops_step_and_the_state_is_optaxs():
    """Numpy: SGD at the rates of the steps it is told, and at those of its own count where it is told none."""
    config = Sgd(lr=LR, schedule=Linear())
    tx, theirs = build_optimizer(config, 10), optax.sgd(build_schedule(config, 10))
    rate = lambda step: LR * (1 - step / 10)
    params = {"w": np.ones(3, np.float32)}
    state = tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure((theirs.init(params)[1],))
    moved = []
    for step in (0, 0, 0, 4, None, None):
        more = {} if step is None else {"step": jnp.int32(step)}
        updates, state = tx.update(params, state, params, **more)
        moved.append(float(-updates["w"][0]))
    np.testing.assert_allclose(moved, [rate(n) for n in (0, 0, 0, 4, 5, 6)], rtol=1e-6)
    assert int(state[0].count) == 7


def test_a_skipped_update_shifts_no_schedule():
    t = trainer(build_optimizer(Sgd(lr=LR, schedule=Linear(end=0.5)), 4))
    t.step(rows(0)), t.step(rows(1, y=np.full((32, 8), np.nan, np.float32)))
    before, reference = host(t.state.params), trainer(optax.sgd(LR * (1 - 2 / 4 * 0.5)))
    reference.state = dataclasses.replace(reference.state, params=jax.tree.map(jnp.asarray, before))
    t.step(rows(2)), reference.step(rows(2))
    for (path, x), (_, y) in zip(named_leaves(t.state.params), named_leaves(reference.state.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7, err_msg=path)


def test_a_multiplier_that_matches_nothing_is_refused():
    tx = build_optimizer(Sgd(lr_multipliers={"embeding": 2.0}), 10)
    with pytest.raises(UserError, match=r"'embeding' matches no parameter \(there are: embedding, norm/scale"):
        tx.init(PARAMS)


def test_what_no_model_could_make_right():
    config = AdamW(
        lr=0,
        clip=-1.0,
        weight_decay=-0.1,
        ema=1.0,
        no_decay=("a(",),
        frozen=("b[",),
        lr_multipliers={"*": 1.0},
        schedule=Wsd(warmup=-1, decay=0.0),
    )
    paths = [path for path, _ in config.problems()]
    assert sorted(paths) == sorted(
        [
            "lr",
            "clip",
            "weight_decay",
            "ema",
            "schedule.warmup",
            "schedule.decay",
            "no_decay",
            "frozen",
            "lr_multipliers",
        ]
    )
    assert AdamW(ema=0.99, weight_decay=0.1, schedule=Wsd(warmup=3)).problems() == []


def test_norms_that_no_model_could_make_right():
    found = AdamW(clip={"^policy/": 0.0, "a(": 1.0, "default": 2.0}).problems()
    assert [path for path, _ in found] == ["clip.^policy/", "clip"]
    assert "expected a positive norm, got 0.0" in found[0][1] and "'a(' is not a regular expression" in found[1][1]
    assert [path for path, _ in AdamW(clip={}).problems()] == ["clip"]
    assert AdamW(clip={"^policy/": 1.0, "default": 2.0}).problems() == []
    assert AdamW(clip=None).problems() == []
