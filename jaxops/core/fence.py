"""A fence against silently wrong gradients: it finds kernels that are still sharded over fsdp when they are multiplied.

XLA (jax 0.10.2 and 0.12, both partitioners) computes wrong gradients, by about 100 % and without a warning, where a
kernel sharded over ("fsdp", "tensor") multiplies an activation sharded over `tensor`, on meshes of data x fsdp x
tensor. The error depends on sizes, so no toy test meets it. It also depends on the compiler, whose programs show
different signs of it in each version. The cure is the same in all versions: a kernel is gathered over fsdp where it is
used, `constrain(kernel, ("embed", "mlp"))`. So the fence reads the traced objective, not the compiled program. It
reports each parameter that is sharded over fsdp and reaches a product of matrices without a constraint that drops fsdp.
It ignores the other axes, so an objective that passes on one mesh with fsdp passes on all.

A parameter stays a kernel through operations that depend on parameters and constants alone: casts, transposes, slices,
layers cut out by a scan, scaling, rows drawn by a key. It stops being a kernel where it meets data: rows that a batch
looks up, biases and scales of an activation. Those were tried on both versions at 12 sizes each, with every kernel
constrained, and all gradients were right. Tested in tests/core/test_fence.py.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxops.core.failures import UserError
from jaxops.core.sharding import Placement, axes_in, named_leaves

AXIS = "fsdp"
PRODUCTS = frozenset({"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"})
_OPAQUE = frozenset({"pallas_call"})
"""Primitives whose bodies no partitioner reads."""


@dataclasses.dataclass(frozen=True)
class Unconstrained:
    """A parameter that is sharded over fsdp, and a product that it reaches in this sharding.

    Attributes:
      path: the parameter's path.
      spec: its sharding.
      product: the name of the product's primitive.
      where: the file, line and function of the product, as far as jax knows them.
    """

    path: str
    spec: PartitionSpec
    product: str
    where: str


def over_fsdp(placed: Iterable[Placement]) -> dict[str, PartitionSpec]:
    """Returns the specs of the parameters sharded over fsdp, by path; there are none on a mesh whose fsdp is 1."""
    return {p.path: p.spec for p in placed if AXIS in axes_in(p.spec)}


def unconstrained_kernels(
    fn: Callable[..., Any], params: PyTree, *args: Any, mesh: Mesh, placed: Iterable[Placement]
) -> list[Unconstrained]:
    """Returns the parameters sharded over fsdp that reach a product of `fn(params, *args)` without a constraint.

    The function is traced as a step traces it, with auto axes; nothing runs. A scalar in `args` counts as no data.

    Args:
      fn: an objective, or any function of parameters that is differentiated.
      params: arrays or `jax.ShapeDtypeStruct`s.
      args: the batch and the key, arrays or shapes; all but keys is data.
      mesh: the mesh; it is set while tracing, so call this outside `jit`.
      placed: the placements of the parameters.
    """
    split = over_fsdp(placed)
    if not split:
        return []
    params, args = jax.tree.map(_shape, (params, args))

    def arrays(params: PyTree, *args: Any) -> list[Any]:
        return [x for x in jax.tree.leaves(fn(params, *args)) if isinstance(x, jax.Array)]

    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(jax.sharding.auto_axes(arrays, out_sharding=PartitionSpec()))(params, *args)
    kernels = [_Value(kernels=frozenset({path} & split.keys())) for path, _ in named_leaves(params)]
    key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    others = [_Value(data=x.size > 1 and not key(x)) for x in jax.tree.leaves(args)]
    walk = _Walk()
    walk.run(traced.jaxpr, [*kernels, *others])
    return [Unconstrained(path, split[path], product, where) for path, product, where in walk.found]


def refuse_unconstrained(found: Sequence[Unconstrained]) -> None:
    """Refuses unconstrained kernels with a message that says how to constrain them.

    Raises:
      UserError: `found` is not empty.
    """
    if not found:
        return
    first = {one.path: one for one in reversed(found)}
    lines = [
        f"  {one.path} {_spec(one.spec)} reaches {one.product} at {one.where}"
        for one in sorted(first.values(), key=lambda one: found.index(one))
    ]
    raise UserError(
        "sharding: parameters that lie over fsdp are multiplied as they lie, for which XLA gives silently wrong"
        " gradients on some meshes:\n" + "\n".join(lines[:12]) + ("\n  ..." if len(lines) > 12 else "") + "\n"
        'Constrain each to its other axes where it is used: jaxops.constrain(kernel, ("embed", "mlp")), a logical name'
        " (or None) for each of its dimensions; or keep it off fsdp by a rule of its own in sharding.rules:"
        f" ['{found[0].path}', []].",
        shared=True,
    )


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype without the sharding: in an objective all axes are auto."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _spec(spec: PartitionSpec) -> str:
    return f"({', '.join('-' if axis is None else axis if isinstance(axis, str) else '+'.join(axis) for axis in spec)})"


@dataclasses.dataclass(frozen=True)
class _Value:
    """The known facts about a variable of a jaxpr.

    Attributes:
      data: whether it depends on data.
      kernels: the paths of the parameters sharded over fsdp that it is a form of.
    """

    data: bool = False
    kernels: frozenset[str] = frozenset()

    def __or__(self, other: "_Value") -> "_Value":
        return _Value(self.data or other.data, self.kernels | other.kernels)


def _union(values: Iterable[_Value]) -> _Value:
    out = _Value()
    for value in values:
        out |= value
    return out


class _Walk:
    """One pass over a jaxpr, equation by equation; it adds (path, product, where) to `found`, each once, in order."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], None] = {}

    def run(self, jaxpr: Jaxpr, ins: Sequence[_Value]) -> list[_Value]:
        """Returns the facts about the outputs, given those about the inputs."""
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, ins, strict=True))
        read = lambda var: _Value() if isinstance(var, Literal) else known.get(var, _Value())
        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [read(var) for var in eqn.invars])
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, ins: list[_Value]) -> list[_Value]:
        name, whole = eqn.primitive.name, _union(ins)
        if name in PRODUCTS:
            where = source_info_util.summarize(eqn.source_info) or "a line that jax does not know"
            self.found.update(dict.fromkeys((path, name, where) for path in sorted(whole.kernels)))
            return [_Value(whole.data)] * len(eqn.outvars)  # reported once: its results are no kernels
        if name in _CONSTRAINTS:
            return [
                _Value(x.data, frozenset() if drops else x.kernels) for x, drops in zip(ins, _drops(eqn), strict=True)
            ]
        bodies = [] if name in _OPAQUE else list(_bodies(eqn))
        if bodies:
            return self._call(eqn, bodies, ins)
        # A scalar counts as no data, even where it is computed from data: it scales a kernel or positions a slice.
        one = [_entries(var) == 1 for var in eqn.outvars]
        kernels = frozenset() if whole.data else whole.kernels
        return [_Value() if alone else _Value(whole.data, kernels) for alone in one]

    def _call(self, eqn: JaxprEqn, bodies: list[Jaxpr], ins: list[_Value]) -> list[_Value]:
        name, params = eqn.primitive.name, eqn.params
        if name == "shard_map":
            return self._shard_map(eqn, bodies[0], ins)
        if name == "scan":
            # Arrays that the loop slices or stacks have one more dimension outside (a scan's params differ by version).
            cut = _count_cut(eqn.invars, bodies[0].invars)
            carried = len(eqn.outvars) - _count_cut(eqn.outvars, bodies[0].outvars)
            return self._loop(bodies[0], ins, len(ins) - cut - carried, carried)
        if name == "while":
            tests, consts = params["cond_nconsts"], params["body_nconsts"]
            test, body = _body(params["cond_jaxpr"]), _body(params["body_jaxpr"])
            out = self._loop(body, ins[tests:], consts, len(ins) - tests - consts)
            self.run(test, [*ins[:tests], *out])
            return out
        if name == "cond":
            ends = [self.run(body, ins[1:]) for body in bodies]
            return [_union(same) for same in zip(*ends, strict=True)]
        if len(bodies) == 1 and len(bodies[0].invars) == len(ins) and len(bodies[0].outvars) == len(eqn.outvars):
            return self.run(bodies[0], ins)
        # An unknown primitive with a body: any output may depend on any input.
        whole = _union([*ins, *(x for body in bodies for x in self.run(body, [_union(ins)] * len(body.invars)))])
        return [whole] * len(eqn.outvars)

    def _loop(self, body: Jaxpr, ins: list[_Value], consts: int, carried: int) -> list[_Value]:
        """Runs the body of a scan or while until the facts about its carry no longer change."""
        fixed, carry, each = ins[:consts], ins[consts : consts + carried], ins[consts + carried :]
        while True:
            out = self.run(body, [*fixed, *carry, *each])
            more = [a | b for a, b in zip(carry, out[:carried], strict=True)]
            if more == carry:
                return [*carry, *out[carried:]]
            carry = more

    def _shard_map(self, eqn: JaxprEqn, body: Jaxpr, ins: list[_Value]) -> list[_Value]:
        """Skips the body where fsdp is manual: each device multiplies its own shard, so XLA partitions no product."""
        params = eqn.params
        if AXIS not in (params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]):
            return self.run(body, ins)
        data, kernels = _union(ins).data, _union(ins).kernels
        cut = [AXIS in axes_in(spec) for spec in params["out_specs"]]
        return [_Value(data, kernels if over and not data else frozenset()) for over in cut]


def _body(value: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return value.jaxpr if isinstance(value, ClosedJaxpr) else value


def _bodies(eqn: JaxprEqn) -> Iterable[Jaxpr]:
    """Yields the jaxprs that an equation runs: jit, remat, custom derivatives, loops, branches."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield _body(item)


def _rank(var: Any) -> int:
    return len(getattr(var.aval, "shape", ()))


def _entries(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))


def _count_cut(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(_rank(out) > _rank(within) for out, within in zip(outside, inside, strict=True))


_CONSTRAINTS = frozenset({"sharding_constraint", "reshard", "device_put"})


def _drops(eqn: JaxprEqn) -> list[bool]:
    """Returns for each operand of a constraint whether the constraint drops fsdp from its sharding."""
    params = eqn.params
    if eqn.primitive.name == "sharding_constraint":
        return [not params["unconstrained_dims"] and _without_fsdp(params["sharding"])]
    if eqn.primitive.name == "reshard":
        to = params["dst_sharding"]
        # A reshard to a mesh of auto axes constrains no use: it is how an objective's arguments enter `auto_axes`.
        return [_axis_type(to) == AxisType.Explicit and _without_fsdp(to)]
    return [isinstance(to, NamedSharding) and _without_fsdp(to) for to in params["devices"]]


def _axis_type(sharding: Any) -> AxisType | None:
    return dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)).get(AXIS)


def _without_fsdp(sharding: Any) -> bool:
    if isinstance(sharding, NamedSharding):
        named = [axis for axis in sharding.spec if axis is not PartitionSpec.UNCONSTRAINED]
        return AXIS not in axes_in(named)
    return bool(sharding.is_fully_replicated)
