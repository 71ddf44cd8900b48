"""Exact matmul FLOPs of a traced function, counted on its jaxpr, so they are the same on any backend.

XLA's cost analysis counts the body of a loop once. Here a scan counts as often as it runs, recomputation under remat
counts as work, and dead code does not count (the model in a counts-only pass). The convention is that of model FLOPs
utilisation: multiply-adds of matmuls and convolutions count as two FLOPs each, and elementwise work does not count.
Tested in tests/core/test_flops.py against numbers counted in numpy.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Flops:
    """The FLOPs of one call, summed over all devices.

    Attributes:
      total: the sum over primitives; a lower bound where `unknown` is not empty.
      by_primitive: the FLOPs of each primitive.
      unknown: the parts of the program that could not be counted.
    """

    total: int
    by_primitive: dict[str, int]
    unknown: tuple[str, ...] = ()


def count_flops(fn: Callable[..., Any] | ClosedJaxpr, *abstract_args: Any) -> Flops:
    """Counts the matmul and convolution FLOPs of one call `fn(*abstract_args)`, summed over all devices.

    Arguments may be arrays or `jax.ShapeDtypeStruct`s; nothing runs. Under an explicit mesh, call it inside
    `jax.set_mesh`. A `cond` counts as its most expensive branch. A while loop of unknown length counts once, and is
    named in `unknown` if its body has FLOPs. An opaque kernel (`pallas_call`, foreign calls) counts as zero, and is
    named in `unknown`.
    """
    closed = fn if isinstance(fn, ClosedJaxpr) else jax.make_jaxpr(fn)(*abstract_args)
    live, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    counts, unknown = _walk(live)
    return Flops(sum(counts.values()), dict(counts), tuple(sorted(unknown)))


_Counts = tuple[Counter[str], set[str]]


def _walk(jaxpr: Jaxpr) -> _Counts:
    counts: Counter[str] = Counter()
    unknown: set[str] = set()
    for eqn in jaxpr.eqns:
        more, unsure = _equation(eqn)
        counts.update(more)
        unknown |= unsure
    return counts, unknown


def _equation(eqn: JaxprEqn) -> _Counts:
    name = eqn.primitive.name
    if name in _LEAVES:
        return Counter({name: _LEAVES[name](eqn)}), set()
    if name in _OPAQUE:
        return Counter(), {f"{name} {eqn.params.get('name') or ''}".strip()}
    bodies = [_walk(body) for body in bodies_of(eqn)]
    unknown = set().union(*(unsure for _, unsure in bodies))
    if name == "cond":
        return max((counts for counts, _ in bodies), key=Counter.total, default=Counter()), unknown
    counts: Counter[str] = sum((counts for counts, _ in bodies), Counter())
    if name == "while" and counts.total():
        unknown.add("while loop of unknown length, counted once")
    times = times_of(eqn)
    return Counter({primitive: n * times for primitive, n in counts.items()}), unknown


def times_of(eqn: JaxprEqn) -> int:
    """Returns the number of times that the body of `eqn` runs: a scan's length, or the devices of a shard_map."""
    if eqn.primitive.name == "scan":
        return int(eqn.params["length"])
    if eqn.primitive.name == "shard_map":
        params = eqn.params
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    return 1


def bodies_of(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """Yields the jaxprs that an equation runs: jit, remat, custom derivatives, loops, branches."""
    values: Sequence[Any] = tuple(eqn.params.values())
    if eqn.primitive.name == "custom_linear_solve":  # its other jaxprs serve differentiation and do not run
        values = (eqn.params["jaxprs"].solve,)
    for value in values:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in var.aval.shape)


def _dot_general(eqn: JaxprEqn) -> int:
    """Counts two FLOPs for every output entry and every entry of the contracted dimensions."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = _shape(eqn.invars[0])
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(lhs[d] for d in contracted)


def _ragged_dot_general(eqn: JaxprEqn) -> int:
    """Counts as a dense product whose groups fill all rows, where each row meets one group only."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    lhs, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    flops = 2 * math.prod(out) * math.prod(lhs[d] for d in contracted)
    ragged_is_contracted = any(d in contracted for d in numbers.lhs_ragged_dimensions)
    return flops // out[0] if ragged_is_contracted else flops  # out[0]: one product for each group


def _conv_general_dilated(eqn: JaxprEqn) -> int:
    """Counts two FLOPs for every product with a real input entry: zeros from padding and dilation are not work.

    A convolution and its two gradients therefore have the same count.
    """
    lhs, rhs, out = _shape(eqn.invars[0]), _shape(eqn.invars[1]), _shape(eqn.outvars[0])
    params = eqn.params
    numbers = params["dimension_numbers"]
    taps = 1
    for i, (left, right, to) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        dilation = params["lhs_dilation"][i]
        at = (
            np.arange(out[to])[:, None] * params["window_strides"][i]
            + np.arange(rhs[right])[None, :] * params["rhs_dilation"][i]
            - params["padding"][i][0]
        )
        taps *= int(((at >= 0) & (at <= (lhs[left] - 1) * dilation) & (at % dilation == 0)).sum())
    batch, features, inputs = out[numbers.out_spec[0]], out[numbers.out_spec[1]], rhs[numbers.rhs_spec[1]]
    return 2 * batch * features * inputs * taps


_LEAVES: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot_general,
    "ragged_dot": _ragged_dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _conv_general_dilated,
}


def product_flops(eqn: JaxprEqn) -> int:
    """Returns the FLOPs of one equation, zero where it is no product of matrices; bodies inside it do not count."""
    count = _LEAVES.get(eqn.primitive.name)
    return count(eqn) if count else 0


_OPAQUE = frozenset(
    {
        "pallas_call",
        "ffi_call",
        "tpu_custom_call",
        "triton_kernel_call",
        "dot_product_attention_fwd_wrapper",
        "dot_product_attention_bwd_wrapper",
        "dot_product_attention_fp8_fwd_wrapper",
        "dot_product_attention_fp8_bwd_wrapper",
        "scaled_matmul_wrapper",
    }
)

# Published dense bf16 FLOP/s of one jax device; the first entry that `device_kind` contains wins.
# TPU: cloud documentation, "TPU v4 / v5e / v5p / v6e / TPU7x". A TPU7x chip (2307e12) is two jax devices.
# GPU: data sheets of A100, H100, H200, B200, without sparsity.
_PEAK_BF16: tuple[tuple[str, float], ...] = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
)


def peak_flops(device_kind: str, dtype: DTypeLike) -> float | None:
    """Returns the published peak dense matmul FLOP/s of one jax device; None where it is unknown (CPU, other chips).

    16-bit floats have the rate of the table. For float32 the rate is that of jax's default matmul precision: one
    bfloat16 pass on TPU (the same rate), TF32 on NVIDIA (half of it). Other dtypes give None.
    """
    peak = next((peak for kind, peak in _PEAK_BF16 if kind in device_kind), None)
    if peak is None or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return None
    return peak / 2 if jnp.dtype(dtype) == jnp.float32 and not device_kind.startswith("TPU") else peak


def mfu(flops_per_step: float, step_seconds: float, devices: Sequence[jax.Device], dtype: DTypeLike) -> float | None:
    """Returns the model FLOPs utilisation in [0, 1]: FLOPs of a step / (seconds x peak FLOP/s of all devices).

    It is None where the peak of a device is unknown. Source: Chowdhery et al. 2022, "PaLM", appendix B. That definition
    leaves recomputation out; the FLOPs of `count_flops` include it where the program recomputes.

    Args:
      flops_per_step: the FLOPs of one step, summed over all devices.
      step_seconds: the time of one step.
      devices: the devices that the step runs on.
      dtype: the dtype of its matmuls.
    """
    peaks = [peak_flops(device.device_kind, dtype) for device in devices]
    if not peaks or step_seconds <= 0 or any(peak is None for peak in peaks):
        return None
    return flops_per_step / (step_seconds * sum(peak for peak in peaks if peak is not None))
