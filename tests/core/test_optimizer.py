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
from jaxops.core.mesh import make_mesh
from jaxops.core.optimizer import (
    Adafactor,
    AdamW,
    Common,
    Constant,
    LinearDecay,
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


def layers_of(tree):
    """The tree with its stacked layers apart, as a model without a scan has them: `layers/0/up/kernel`."""
    apart = [jax.tree.map(lambda x, at=at: x[at], tree["layers"]) for at in range(3)]
    return {**tree, "layers": apart}


STACKED = {
    "embedding": {"kernel": RNG.normal(size=(6, 8)).astype(np.float32)},
    "layers": {
        "up": {"kernel": RNG.normal(size=(3, 8, 20)), "bias": RNG.normal(size=(3, 20))},
        "down": {"kernel": RNG.normal(size=(3, 20, 8))},
        "square": {"kernel": RNG.normal(size=(3, 3, 3))},
        "norm": {"scale": RNG.normal(size=(3, 8))},
        "heads": {"kernel": RNG.normal(size=(3, 8, 2, 4))},
    },
    "head": {"kernel": RNG.normal(size=(8, 6))},
}


def in_dtype(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), STACKED)
    rng = np.random.default_rng(1)
    return params, [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(dtype), params) for _ in range(3)]


def updates_of(config, params, grads):
    """The sum of three updates, and the state."""
    tx = build_optimizer(config, 10)
    with jax.numpy_dtype_promotion("standard"):
        state, total = tx.init(params), jax.tree.map(jnp.zeros_like, params)
        for each in grads:
            update, state = tx.update(each, state, params)
            total = jax.tree.map(jnp.add, total, update)
    return jax.device_get(total), state


def newton_schulz(x):
    """Five of Jordan's quintic iterations in float64."""
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if turned else x


def test_muon_takes_stacked_layers_for_a_matrix_each():
    config = Muon(lr=LR, momentum=0.9, adam_lr=LR / 4, weight_decay=DECAY)
    params, grads = in_dtype(np.float32)
    stacked, state = updates_of(config, params, grads)
    apart, _ = updates_of(config, layers_of(params), [layers_of(each) for each in grads])
    there = dict(named_leaves(layers_of(stacked)))
    for path, x in named_leaves(apart):
        if "heads" not in path:  # rank 3 in a layer and 4 in the stack: Adam's, both
            np.testing.assert_allclose(there[path], x, rtol=1e-5, atol=1e-7, err_msg=path)
    muon = {path.partition("mu/")[2] for path, _ in named_leaves(state) if "muon" in path and "mu/" in path}
    assert muon == {"layers/up/kernel", "layers/down/kernel", "layers/square/kernel", "head/kernel"}


def test_a_stack_under_muon_is_numpys_and_its_vectors_are_adams():
    params, grads = in_dtype(np.float64)
    with jax.enable_x64(True):
        found, _ = updates_of(Muon(lr=LR, momentum=0.9), params, grads)
        adam, _ = updates_of(AdamW(lr=LR), params, grads)
    for name in ("up", "down", "square"):
        for layer in range(3):
            m, total = 0.0, 0.0
            for t, each in enumerate(grads, 1):
                g = each["layers"][name]["kernel"][layer]
                m = 0.9 * m + 0.1 * g
                d = newton_schulz(0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t))
                total -= LR * d * max(1.0, d.shape[1] / d.shape[0]) ** 0.5
            np.testing.assert_allclose(found["layers"][name]["kernel"][layer], total, rtol=1e-6, atol=1e-9)
    for path in ("layers/up/bias", "layers/norm/scale", "layers/heads/kernel", "embedding/kernel"):
        np.testing.assert_array_equal(dict(named_leaves(found))[path], dict(named_leaves(adam))[path])


@pytest.mark.parametrize(
    ("path", "shape", "stacked", "muon"),
    [
        ("layers/up/kernel", (3, 8, 8), None, True),
        ("decoder/layers/attention/q/kernel", (3, 8, 8), None, True),
        ("layers/norm/scale", (3, 8), None, False),
        ("layers/0/kernel", (8, 8), None, True),
        ("mlp/layers/12/kernel", (8, 8), None, True),
        ("layers/0/kernel", (3, 8, 8), None, False),
        ("layers/0", (8, 8), None, True),
        ("layers/0up/kernel", (3, 8, 8), None, True),
        ("players/up/kernel", (8, 8), None, True),
        ("blocks/up/kernel", (3, 8, 8), None, False),
        ("blocks/up/kernel", (3, 8, 8), ("^blocks/",), True),
        ("blocks/scale", (3, 8), ("^blocks/",), False),
        ("layers/up/kernel", (8, 8), (), True),
        ("layers/up/embedding", (3, 8, 8), None, False),
        ("layers/up/kernel", (2, 3, 8, 8), None, False),
        ("up/kernel", (3, 8, 8), None, False),
        ("bias", (8,), None, False),
    ],
)
def test_what_muon_takes_for_a_matrix(path, shape, stacked, muon):
    config = Muon() if stacked is None else Muon(stacked=stacked)
    params = {}
    *folders, name = path.split("/")
    node = params
    for each in folders:
        node = node.setdefault(each, {})
    node[name] = np.ones(shape, np.float32)
    _, state = updates_of(config, params, [])
    mu = {at for at, x in named_leaves(state) if "muon" in at and x.shape == shape}
    assert bool(mu) == muon


def test_patterns_of_muon_are_checked():
    assert [path for path, _ in Muon(adam=("a(",), stacked=("b[",), no_decay=("*",)).problems()] == [
        "no_decay",
        "adam",
        "stacked",
    ]
    assert Muon().problems() == []


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
    np.testing.assert_allclose(lr_at(LinearDecay(warmup=3), 3, 0, 1, 2), [2 / 3, 4 / 3, 2.0], rtol=1e-6)


def test_linear():
    np.testing.assert_allclose(lr_at(LinearDecay(), 10, 0, 5, 9, 10), [2.0, 1.0, 0.2, 0.0], atol=1e-6)
    found = lr_at(LinearDecay(warmup=2, end=0.1), 12, 1, 2, 7, 12)
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
        build_optimizer(AdamW(schedule=LinearDecay(warmup=11)), 10)


def test_the_schedule_drives_the_updates():
    moved = after_three(build_optimizer(Sgd(lr=LR, schedule=LinearDecay()), 4))
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
    config = Sgd(lr=LR, schedule=LinearDecay())
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
    t = trainer(build_optimizer(Sgd(lr=LR, schedule=LinearDecay(end=0.5)), 4))
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


@pytest.mark.parametrize("axes", [(None, "fsdp", "tensor"), ("fsdp", None, "tensor")])
def test_a_stack_under_muon_on_eight_devices_is_as_on_one(axes):
    params, grads = in_dtype(np.float32)
    params, *grads = (
        {"layers": {"up": each["layers"]["up"], "more": each["layers"]["down"]}} for each in (params, *grads)
    )
    pad = lambda tree: jax.tree.map(lambda x: np.concatenate([x, x[:1]]), tree)  # four layers
    params, grads = pad(params), list(map(pad, grads))
    tx = build_optimizer(Muon(lr=LR, momentum=0.9), 10)
    expected, _ = updates_of(Muon(lr=LR, momentum=0.9), params, grads)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes[: x.ndim]) if x.ndim == 3 else jax.P()))
        params = jax.tree.map(place, params)
        state = jax.jit(tx.init)(params)
        mu = {path: x for path, x in named_leaves(state) if path.endswith("kernel") and "muon" in path}
        assert len(mu) == 2 and all(tuple(x.sharding.spec)[:3] == axes for x in mu.values())
        out = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (params, state))
        update = jax.jit(jax.sharding.auto_axes(tx.update, out_sharding=out))
        total = jax.tree.map(np.zeros_like, expected)
        for each in grads:
            moved, state = update(jax.tree.map(place, each), state, params)
            total = jax.tree.map(np.add, total, jax.device_get(moved))
    for (path, x), (_, y) in zip(named_leaves(total), named_leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6, err_msg=path)


def test_norms_that_no_model_could_make_right():
    found = AdamW(clip={"^policy/": 0.0, "a(": 1.0, "default": 2.0}).problems()
    assert [path for path, _ in found] == ["clip.^policy/", "clip"]
    assert "expected a positive norm, got 0.0" in found[0][1] and "'a(' is not a regular expression" in found[1][1]
    assert [path for path, _ in AdamW(clip={}).problems()] == ["clip"]
    assert AdamW(clip={"^policy/": 1.0, "default": 2.0}).problems() == []
    assert AdamW(clip=None).problems() == []
