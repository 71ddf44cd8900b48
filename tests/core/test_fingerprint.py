"""Equal arrays have one fingerprint however they are laid out, and every sort of change is seen."""

import hashlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxops.core import fingerprint as module
from jaxops.core.fingerprint import fingerprint

P = PartitionSpec
ROOT = pathlib.Path(__file__).parents[2]


def mesh(kind=AxisType.Explicit, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def of(*arrays):
    return fingerprint({("frozen", str(i)): array for i, array in enumerate(arrays)})


def mixed(x):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def test_the_sums_are_those_of_whole_numbers_in_python():
    """The digest is part of the format: a run goes on with the edition that another jaxops wrote."""
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    first = second = 0
    for i, bits in enumerate(x.view(np.uint32).ravel().tolist()):
        key = mixed((i + 0x9E3779B9) % 2**32)
        one = mixed(bits ^ key)
        first, second = first + one, second + mixed((one + key * 0x85EBCA6B) % 2**32)
    said = json.dumps([["frozen/w", [3, 5], "float32", [first % 2**32, second % 2**32]]])
    assert fingerprint({("frozen", "w"): jnp.asarray(x)}) == hashlib.sha256(said.encode()).hexdigest()


SPECS = [
    P(),
    P("a"),
    P("b"),
    P(None, "a"),
    P("a", "b"),
    P("b", "a"),
    P(("a", "b")),
    P(None, ("b", "a")),
    P(None, None, "b"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_the_layout_does_not_matter(dtype):
    x = (np.random.default_rng(1).standard_normal((8, 16, 4)) * 9).astype(dtype)
    expected = of(x)
    for shape in ({"a": 2, "b": 4}, {"a": 4, "b": 2}, {"a": 8, "b": 1}):
        for kind in (AxisType.Explicit, AxisType.Auto):
            for spec in SPECS:
                assert of(jax.device_put(x, NamedSharding(mesh(kind, **shape), spec))) == expected, (shape, kind, spec)
    assert of(jax.device_put(x, jax.devices()[3])) == expected
    assert isinstance(jnp.asarray(x).sharding, SingleDeviceSharding) and of(jnp.asarray(x)) == expected


def test_a_sharding_without_names_is_read_part_by_part(monkeypatch):
    x = np.arange(128.0, dtype=np.float32).reshape(16, 8)
    monkeypatch.setattr(module, "NamedSharding", ())
    assert of(jax.device_put(x, NamedSharding(mesh(a=2, b=4), P("b", "a")))) == of(x)


def test_the_memory_that_holds_an_array_does_not_matter():
    x = np.random.default_rng(7).standard_normal((16, 8)).astype(np.float32)
    for spec in (P(), P("a")):
        kept = jax.device_put(x, NamedSharding(mesh(a=8), spec, memory_kind="pinned_host"))
        assert kept.sharding.memory_kind == "pinned_host" and of(kept) == of(x)


def test_the_mesh_in_force_does_not_matter():
    x = np.random.default_rng(6).standard_normal((16, 8)).astype(np.float32)
    expected = of(x, np.float32(1))
    for spec in (P(), P("a"), P(("a", "b"))):
        whole, scalar = (
            jax.device_put(y, NamedSharding(mesh(a=2, b=4), s)) for y, s in ((x, spec), (np.float32(1), P()))
        )
        for other in (mesh(a=2, b=4), mesh(a=8), mesh(AxisType.Auto, c=4, a=2), jax.make_mesh((1,), ("a",))):
            with jax.set_mesh(other):
                assert of(whole, scalar) == expected
                assert of(x, np.float32(1)) == of(jnp.asarray(x), jnp.float32(1)) == expected


DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "int32",
    "int8",
    "int4",
    "uint4",
    "uint8",
    "bool",
    "complex64",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_jax_agree_and_every_entry_counts(dtype):
    rng = np.random.default_rng(2)
    x = rng.integers(0, 2 if dtype == "bool" else 7, (5, 6)).astype(jnp.dtype(dtype))
    expected = of(x)
    assert of(jnp.asarray(x)) == expected
    assert of(jnp.asarray(x[:, 0])) == of(np.array(x[:, 0])) == of(x[:, 0])  # not contiguous
    assert of(x[0, 0]) == of(jnp.asarray(x[0, 0]))
    seen = {expected}
    for i in np.ndindex(5, 6):
        changed = x.copy()
        changed[i] = not x[i] if dtype == "bool" else int(x[i].real) - 1 if int(x[i].real) else 7
        seen.add(of(changed))
    assert len(seen) == 31


def test_the_wide_ones_are_not_rounded():
    x = np.arange(6.0).reshape(2, 3)
    assert of(x) != of(x + 1e-12) and of(x) != of(x.astype(np.float32))
    assert of(x * 1j) != of(x + 0j) and of(np.float64(1)) != of(np.float64(1 + 1e-15))
    with jax.enable_x64(True):
        for dtype in ("float64", "int64", "complex128"):
            wide = x.astype(dtype)
            assert of(jnp.asarray(wide)) == of(wide)


def test_what_must_not_collide():
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal((64, 32)).astype(np.float32) for _ in range(2))
    flip = lambda *rows: np.where(np.isin(np.arange(64), rows)[:, None], -a, a)
    put = lambda x, value: np.concatenate([np.float32([value]), x.ravel()[1:]]).reshape(x.shape)
    nan = lambda payload: np.uint32([0x7FC00000 + payload]).view(np.float32)[0]
    bits = a.view(np.uint32)
    digests = [
        of(a, b), of(b, a), of(a, a), of(b, b), of(a), of(b), of(a.T), of(a.reshape(32, 64)), of(a.ravel()),
        of(a[::-1]), of(a[:, ::-1]), of(np.roll(a, 1)), of(np.roll(a, 1, 1)), of(a[rng.permutation(64)]),
        of(-a), of(flip(0)), of(flip(1)), of(flip(0, 1)), of(flip(2, 3)), of(flip(*range(32))),
        of(put(a, 0.0)), of(put(a, -0.0)), of(put(a, nan(0))), of(put(a, nan(1))), of(put(a, np.inf)),
        of((bits ^ np.uint32(1)).view(np.float32)), of((bits + np.uint32(1)).view(np.float32)), of(bits),
        of((bits ^ np.uint32(1 << 31)).view(np.int32)), of(a.astype(jnp.bfloat16)), of(a.astype(np.float16)),
        of(np.zeros_like(a)), of(-np.zeros_like(a)), of(np.zeros((64, 33), np.float32)), of(np.zeros(1, np.float32)),
        fingerprint({("frozen", "x"): a}), fingerprint({("frozen", "x", "0"): a}), fingerprint({}),
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    assert fingerprint({("f", 0): a, ("f", 1): b}) == fingerprint({("f", "1"): b, ("f", "0"): a})


def test_structured_changes_do_not_cancel_out():
    """Both sums, told apart over many swaps, sign flips and equal steps, as 64 bits that look random would be."""
    x = np.random.default_rng(4).standard_normal(64).astype(np.float32)
    variants = []
    for i in range(64):
        for j in range(i):
            swapped, flipped, moved = x.copy(), x.copy(), x.copy().view(np.uint32)
            swapped[[i, j]] = swapped[[j, i]]
            flipped[[i, j]] *= -1
            moved[[i, j]] += np.uint32([1, 2**32 - 1])
            variants += [swapped, flipped, moved.view(np.float32)]
    one = jax.jit(lambda x: module._sums_of(x, jnp.zeros(1, jnp.uint32), (64,)))
    sums = np.stack([np.asarray(one(v)) for v in [x, *variants]])
    assert len({tuple(row) for row in sums.tolist()}) == len(sums) == 6049
    # Of 6049 sums of 32 random bits, 0.004 pairs are expected to be equal.
    assert len(set(sums[:, 0].tolist())) >= 6047 and len(set(sums[:, 1].tolist())) >= 6047


def test_positions_beyond_32_bits_are_told_apart(monkeypatch):
    """With positions counted modulo 16 an array repeats itself, but for the count over the first dimensions."""
    monkeypatch.setattr(module, "_WORD", 16)
    module._sums.clear_cache(), module._sums_of.clear_cache()
    x = np.random.default_rng(5).standard_normal((8, 2, 8)).astype(np.float32)
    seen = {of(np.roll(x, i, axis=0)) for i in range(8)} | {of(x[:, ::-1]), of(np.roll(x, 1, axis=2))}
    assert len(seen) == 10
    module._sums.clear_cache(), module._sums_of.clear_cache()


WORKER = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]), initialization_timeout=60)
from jaxops.core.failures import RunFailed
from jaxops.core.fingerprint import fingerprint
x = np.arange(64, dtype=np.float32).reshape(8, 8)
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
put = lambda spec: jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec), lambda i: x[i])
for spec in (jax.P(), jax.P("a"), jax.P("b"), jax.P("b", "a"), jax.P(("a", "b"))):
    print("SAID", fingerprint({("w",): put(spec), ("n",): x}))
try:
    fingerprint({("w",): x + jax.process_index()})
except RunFailed as error:
    print("SAID", str(error))
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds():
    from object_stores import free_port

    port, x = free_port(), np.arange(64, dtype=np.float32).reshape(8, 8)
    command = [sys.executable, "-c", WORKER, str(port)]
    started = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, cwd=ROOT) for rank in range(2)
    ]
    try:
        outs = [process.communicate(timeout=120)[0].splitlines() for process in started]
    finally:
        for process in started:
            process.kill()
    said = [[line.removeprefix("SAID ") for line in out if line.startswith("SAID ")] for out in outs]
    alone = fingerprint({("w",): x, ("n",): x})
    assert said[0] == said[1] == [alone] * 5 + ["w should be the same on every process, and is not"]
