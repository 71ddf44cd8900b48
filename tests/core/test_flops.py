"""FLOP counts against numbers counted by hand or by numpy loops; peaks and utilisation."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from jaxops.core.flops import count_flops, mfu, peak_flops

pytestmark = pytest.mark.latest


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def mesh(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * len(names))


def test_matmul():
    flops = count_flops(lambda a, b: jnp.tanh(a @ b) + 1.0, spec(8, 16), spec(16, 4))
    assert flops.total == 2 * 8 * 16 * 4
    assert flops.by_primitive == {"dot_general": flops.total}
    assert flops.unknown == ()


def test_elementwise_work_is_not_counted():
    assert count_flops(lambda a: jnp.exp(a).sum(), spec(128, 128)).total == 0


def test_batched_einsum():
    flops = count_flops(lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), spec(2, 5, 3, 8), spec(2, 7, 3, 8))
    assert flops.total == 2 * (2 * 3 * 5 * 7) * 8


def test_a_closed_jaxpr_and_a_jitted_function_count_the_same():
    f = lambda a: a @ a
    expected = 2 * 32**3
    assert count_flops(jax.make_jaxpr(f)(spec(32, 32))).total == expected
    assert count_flops(jax.jit(f), spec(32, 32)).total == expected
    assert count_flops(f, np.zeros((32, 32), np.float32)).total == expected


def scanned(x, ws, body=lambda c, w: (c @ w, None)):
    return jax.lax.scan(body, x, ws)[0]


def test_a_scan_counts_as_often_as_it_runs():
    assert count_flops(scanned, spec(32, 32), spec(10, 32, 32)).total == 655_360


def test_scan_inside_scan():
    outer = lambda x, ws: jax.lax.scan(lambda c, _: (scanned(c, ws), None), x, length=3)[0]
    assert count_flops(outer, spec(32, 32), spec(10, 32, 32)).total == 3 * 655_360


def test_gradient_of_a_scan_is_two_more_products_for_each():
    loss = lambda x, ws: scanned(x, ws, lambda c, w: (jnp.tanh(c @ w), None)).sum()
    grad = jax.grad(loss, argnums=(0, 1))
    assert count_flops(grad, spec(32, 32), spec(10, 32, 32)).total == 3 * 655_360


def test_recomputation_under_remat_is_seen():
    body = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
    grad = jax.grad(lambda x, ws: scanned(x, ws, body).sum(), argnums=(0, 1))
    assert count_flops(grad, spec(32, 32), spec(10, 32, 32)).total == 4 * 655_360 == 2_621_440


def test_dead_code_does_not_count():
    """A counts-only pass takes the counts and drops the totals: XLA removes the model, and so do we."""

    def objective(w, x):
        return jnp.tanh(x @ w).sum(), jnp.asarray(x.shape[0], jnp.float32)

    counts_only = lambda w, x: jax.lax.scan(lambda c, xs: (c + jax.jit(objective)(w, xs)[1], None), jnp.zeros(()), x)[0]
    assert count_flops(counts_only, spec(8, 4), spec(5, 16, 8)).total == 0
    assert count_flops(objective, spec(8, 4), spec(16, 8)).total == 2 * 16 * 8 * 4


def test_cond_counts_its_dearest_branch():
    f = lambda x: jax.lax.cond(x[0, 0] > 0, lambda z: z @ z @ z, lambda z: z @ z, x)
    assert count_flops(f, spec(8, 8)).total == 2 * 2 * 8**3


def test_a_while_loop_counts_once_and_is_reported():
    f = lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ c, x)
    flops = count_flops(f, spec(8, 8))
    assert flops.total == 2 * 8**3
    assert flops.unknown == ("while loop of unknown length, counted once",)


def test_a_loop_of_known_length_and_one_without_matmuls_are_not_reported():
    f = lambda x: jax.lax.fori_loop(0, 5, lambda i, c: c @ c, x)
    assert count_flops(f, spec(8, 8)) == count_flops(lambda x: scanned(x, jnp.zeros((5, 8, 8))), spec(8, 8))
    g = lambda x: jax.lax.while_loop(lambda c: c[0] > 0, lambda c: c - 1, x)
    assert count_flops(g, spec(8)).unknown == ()


def test_custom_derivatives():
    @jax.custom_vjp
    def f(x):
        return x @ x

    f.defvjp(lambda x: (x @ x, x), lambda x, ct: (ct @ x @ x,))

    @jax.custom_jvp
    def g(x):
        return x @ x

    g.defjvp(lambda p, t: (g(p[0]), t[0] @ p[0]))
    one = 2 * 8**3
    assert count_flops(f, spec(8, 8)).total == one
    assert count_flops(g, spec(8, 8)).total == one
    loss = lambda fn, x: jnp.square(fn(x)).sum()
    assert count_flops(jax.grad(functools.partial(loss, f)), spec(8, 8)).total == 3 * one
    assert count_flops(jax.grad(functools.partial(loss, g)), spec(8, 8)).total == 2 * one


def test_linear_solve_counts_only_what_runs():
    flops = count_flops(jnp.linalg.solve, spec(8, 8), spec(8))
    assert flops.total == 0


def test_shard_map_counts_every_device_of_its_manual_axes():
    full = 2 * 32 * 32 * 16
    m = mesh((2, 4), ("a", "b"))
    with jax.set_mesh(m):
        sharded = jax.NamedSharding(m, PartitionSpec("a"))
        x = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=sharded)
        w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=jax.NamedSharding(m, PartitionSpec()))
        spec_in, spec_out = (PartitionSpec("a"), PartitionSpec()), PartitionSpec("a")
        dot = lambda x, w: x @ w
        assert count_flops(jax.jit(dot), x, w).total == full
        whole = jax.shard_map(dot, in_specs=spec_in, out_specs=spec_out)
        # Rows are split over "a" (2); over "b" (4) the same product is computed four times.
        assert count_flops(whole, x, w).total == 4 * full
        part = jax.shard_map(dot, in_specs=spec_in, out_specs=spec_out, axis_names={"a"})
        assert count_flops(part, x, w).total == full


def test_auto_axes_counts_global_shapes():
    m = mesh((8,), ("data",))
    with jax.set_mesh(m):
        x = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=jax.NamedSharding(m, PartitionSpec("data")))
        f = jax.sharding.auto_axes(lambda z: (z @ z.T).sum(), out_sharding=PartitionSpec())
        assert count_flops(f, x).total == 2 * 32**3
        assert count_flops(jax.grad(f), x).total == 2 * 2 * 32**3


def brute_force_conv(lhs, rhs, *, stride, padding, lhs_dilation, rhs_dilation, groups, batch_groups):
    """Multiply-adds with a real input entry of an NCHW x OIHW convolution, one by one."""
    count = 0
    outs = []
    for i in range(2):
        wide = (lhs[2 + i] - 1) * lhs_dilation[i] + 1 + sum(padding[i])
        outs.append((wide - ((rhs[2 + i] - 1) * rhs_dilation[i] + 1)) // stride[i] + 1)
    for y, x, dy, dx in itertools.product(range(outs[0]), range(outs[1]), range(rhs[2]), range(rhs[3])):
        at = [o * stride[i] + k * rhs_dilation[i] - padding[i][0] for i, (o, k) in enumerate([(y, dy), (x, dx)])]
        real = all(0 <= at[i] <= (lhs[2 + i] - 1) * lhs_dilation[i] and at[i] % lhs_dilation[i] == 0 for i in range(2))
        count += real
    return 2 * count * (lhs[0] // batch_groups) * rhs[0] * rhs[1]


@pytest.mark.parametrize(
    ("lhs", "rhs", "options"),
    [
        ((2, 3, 9, 9), (4, 3, 3, 3), {}),
        ((2, 3, 9, 8), (4, 3, 3, 2), {"stride": (2, 3), "padding": ((1, 1), (2, 0))}),
        ((2, 6, 9, 9), (4, 3, 3, 3), {"groups": 2, "rhs_dilation": (2, 1), "padding": ((2, 2), (1, 1))}),
        ((2, 3, 5, 5), (4, 3, 3, 3), {"lhs_dilation": (2, 3), "padding": ((2, 2), (0, 1))}),
        ((4, 3, 6, 6), (4, 3, 3, 3), {"batch_groups": 2}),
    ],
)
def test_convolution(lhs, rhs, options):
    o = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}
    o |= {"groups": 1, "batch_groups": 1} | options
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x,
        w,
        o["stride"],
        o["padding"],
        o["lhs_dilation"],
        o["rhs_dilation"],
        feature_group_count=o["groups"],
        batch_group_count=o["batch_groups"],
    )
    flops = count_flops(conv, spec(*lhs), spec(*rhs))
    assert flops.total == brute_force_conv(lhs, rhs, **o) > 0
    grad = jax.grad(lambda x, w: jnp.square(conv(x, w)).sum(), argnums=(0, 1))
    assert count_flops(grad, spec(*lhs), spec(*rhs)).total == 3 * flops.total


def test_a_plain_convolution_is_the_textbook_number():
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "VALID")
    assert count_flops(conv, spec(2, 3, 9, 9), spec(4, 3, 3, 3)).total == 2 * (2 * 4 * 7 * 7) * (3 * 3 * 3)


def test_ragged_dot_and_its_gradients():
    """Rows [0, 8), [8, 16), ... each meet one of the four matrices."""
    f = lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes)
    args = spec(32, 16), spec(4, 16, 8), spec(4, dtype=jnp.int32)
    one = sum(2 * 8 * 16 * 8 for _ in range(4))
    assert count_flops(f, *args).total == one
    grad = jax.grad(lambda *a: jnp.square(f(*a)).sum(), argnums=(0, 1))
    assert count_flops(grad, *args).total == 3 * one


def test_a_pallas_kernel_is_ignored_and_named():
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] @ x_ref[...]

    def f(x):
        call = pl.pallas_call(kernel, out_shape=spec(8, 8), interpret=True, name="my_kernel")
        return call(x) @ x

    flops = count_flops(f, spec(8, 8))
    assert flops.total == 2 * 8**3
    assert flops.unknown == ("pallas_call my_kernel",)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
        ("Radeon", None),
    ],
)
def test_peak_flops(kind, expected):
    assert peak_flops(kind, jnp.bfloat16) == expected


def test_peak_flops_of_other_types():
    assert peak_flops("TPU v4", jnp.float32) == 275e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert peak_flops("TPU v4", jnp.int8) is None


def test_mfu():
    chips = [types.SimpleNamespace(device_kind="TPU v4")] * 4
    assert mfu(275e12, 0.5, chips, jnp.bfloat16) == pytest.approx(0.5)
    assert mfu(1e12, 0.5, jax.devices(), jnp.bfloat16) is None
    assert mfu(1e12, 0.0, chips, jnp.bfloat16) is None
    assert mfu(1e12, 0.5, [], jnp.bfloat16) is None
