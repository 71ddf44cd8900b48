"""Checks of the programs of a step that need no array: traced and compiled for the mesh of the config.

Tested in tests/audit/test_programs.py.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from jaxops.audit.finding import Finding
from jaxops.core.fence import Unconstrained
from jaxops.core.flops import bodies_of, product_flops, times_of
from jaxops.core.memory import bytes_per_device, readable
from jaxops.core.mesh import BATCH_AXES
from jaxops.core.sharding import axes_in, named_leaves
from jaxops.core.state import State
from jaxops.core.step import cast
from jaxops.plan.collectives import Collective
from jaxops.plan.program import Compiled

LARGE = 2**20
"""An array of this many bytes on a device is worth dividing; a smaller one is not."""
SHARDING_AXES = ("fsdp", "tensor")
"""The mesh axes that divide parameters."""
CALLBACKS = ("callback", "debug_print", "outfeed", "infeed")
"""Parts of the names of primitives that wait for the host."""
LOSSY = ("scatter inputs have incompatible types", "Explicitly requested dtype", "discards the imaginary part")
"""Parts of the warnings with which jax casts all the same, while a function is traced."""
WIDE_SHARE = 0.05
"""The largest share of the products' FLOPs that is computed in float32 where the config computes in bfloat16."""
SLACK = 1.5
"""How much more than a layout needs may be exchanged: XLA gathers small things twice rather than keep them."""


def equations(jaxpr: Jaxpr, times: int = 1) -> Iterator[tuple[JaxprEqn, int]]:
    """Yields all equations of a jaxpr and of those inside it, with how often each runs (a while loop's body once)."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        for body in bodies_of(eqn):
            yield from equations(body, times * times_of(eqn))


def fence_finding(unconstrained: Sequence[Unconstrained] | None) -> Finding:
    """Checks that no parameter is multiplied while it is sharded over fsdp; None where the mesh has no fsdp."""
    if unconstrained is None:
        return Finding.skipped("fence", "no parameter is sharded over fsdp")
    named = [f"{one.path} reaches {one.product} at {one.where}" for one in unconstrained]
    problem = (
        f"XLA may give silently wrong gradients: {named[0]}; constrain it to its other axes where it is used,"
        ' jaxops.constrain(kernel, ("embed", "mlp"))'
        if named
        else None
    )
    return Finding.of("fence", problem, "every kernel leaves fsdp before it is multiplied", named)


def host_finding(programs: Mapping[str, ClosedJaxpr]) -> Finding:
    """Checks that no program waits for the host in the middle: callbacks and prints."""
    found = sorted(
        {
            f"{eqn.primitive.name} in {name}"
            for name, program in programs.items()
            for eqn, _ in equations(program.jaxpr)
            if any(word in eqn.primitive.name for word in CALLBACKS)
        }
    )
    problem = f"the devices wait for the host in every step: {', '.join(found)}" if found else None
    return Finding.of("host", problem, f"no callback in {len(programs)} program(s)", found)


def promotions_finding(objective: Callable[..., Any], params: PyTree, batch: Any, compute: Any) -> Finding:
    """Checks that the objective computes in the dtype of the config: nothing in float64, no wide products in bfloat16.

    Call it inside `jax.set_mesh(mesh)`.

    Args:
      objective: the objective with auto axes.
      params: shapes of its parameters.
      batch: shapes of the batch as it sees it.
      compute: dtype that parameters are cast to.
    """

    def run(params: PyTree, batch: Any, key: Any) -> Any:
        if "rows" in batch:
            batch = {**batch, "rows": cast(batch["rows"], compute)}
        return objective(cast(params, compute), batch, key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    given = {str(getattr(x, "dtype", "")) for x in jax.tree.leaves((params, batch))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = jax.make_jaxpr(run)(params, batch, key)
    lossy = [str(one.message) for one in caught if any(words in str(one.message) for words in LOSSY)]
    wide, total = 0.0, 0.0
    doubles: dict[str, None] = {}
    for eqn, times in equations(traced.jaxpr):
        dtypes = [getattr(var.aval, "dtype", None) for var in (*eqn.invars, *eqn.outvars)]
        if "float64" not in given and any(dtype == np.float64 for dtype in dtypes[len(eqn.invars) :]):
            doubles[eqn.primitive.name] = None
        flops = times * product_flops(eqn)
        total += flops
        wide += flops * any(dtype == np.float32 for dtype in dtypes[: len(eqn.invars)])
    if doubles:
        return Finding(
            "promotions", "failed", f"float32 became float64 in {', '.join(list(doubles)[:4])}", len(doubles), 0
        )
    if lossy:
        return Finding("promotions", "failed", f"a cast loses something: {lossy[0]}", lossy)
    if compute != jnp.bfloat16:
        return Finding("promotions", "passed", f"everything is computed in {jnp.dtype(compute).name}")
    share = wide / (total or 1.0)
    problem = (
        f"{100 * share:.0f} % of the products' FLOPs are float32, though precision.compute is bfloat16: cast the data"
    )
    return Finding.of(
        "promotions",
        problem if share > WIDE_SHARE else None,
        "products are computed in bfloat16",
        share,
        WIDE_SHARE,
    )


def types_finding(before: State, after: State) -> Finding:
    """Checks that a step returns a state of the very types that it was given: else it is compiled a second time.

    Args:
      before: the abstract state.
      after: the abstract state that the step returns.
    """
    told = lambda x: f"{jnp.dtype(x.dtype).name}{list(x.shape)}{' weak' if getattr(x, 'weak_type', False) else ''}"
    pairs = zip(named_leaves(dataclasses.asdict(before)), named_leaves(dataclasses.asdict(after)), strict=True)
    changed = [f"{path}: {told(old)} becomes {told(new)}" for (path, old), (_, new) in pairs if told(old) != told(new)]
    problem = f"the state changes its type in a step: {'; '.join(changed[:3])}" if changed else None
    return Finding.of("types", problem, "a step returns the types that it takes", changed)


def donation_finding(programs: Mapping[str, Compiled]) -> Finding:
    """Checks that what the programs donate is used again: else the old and the new state lie side by side."""
    given = {name: one for name, one in programs.items() if one.donated}
    if not given:
        return Finding.skipped("donation", "no program donates anything")
    lost = {name: one.donated - one.aliased for name, one in given.items() if not one.donation_works}
    told = ", ".join(f"{name} keeps {readable(size)} of {readable(given[name].donated)}" for name, size in lost.items())
    problem = (
        f"donated buffers are not used again: {told} a device: a result has another type or sharding" if lost else None
    )
    aliased = sum(one.aliased for one in given.values())
    return Finding.of("donation", problem, f"{readable(aliased)} a device are updated in place", lost)


def replicated_finding(state: State, program: ClosedJaxpr, mesh: Mapping[str, int], large: int = LARGE) -> Finding:
    """Checks that no large array lies whole on every device though an axis could divide it.

    Args:
      state: the abstract state, placed on the mesh.
      program: the update; arrays that it closes over lie on every device.
      mesh: sizes of the mesh axes.
      large: the bytes from which an array counts as large.
    """
    axes = [axis for axis in SHARDING_AXES if mesh.get(axis, 1) > 1]
    closed = [x for x in _constants(program) if _bytes(x) >= large]
    if closed:
        told = ", ".join(f"{x.dtype}{list(x.shape)}" for x in closed[:3])
        problem = (
            f"the step closes over {readable(sum(map(_bytes, closed)))} of constants ({told}): put them into the batch"
        )
        return Finding("replicated", "failed", f"{problem}, the parameters or an extra", len(closed), 0)
    if not axes:
        return Finding.skipped("replicated", "no axis of the mesh divides parameters (fsdp, tensor)")
    found: dict[str, int] = {}
    for path, leaf in named_leaves(dataclasses.asdict(state)):
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else ()
        could = [axis for axis in axes if any(size % mesh[axis] == 0 and size for size in leaf.shape)]
        if bytes_per_device({"": leaf}) >= large and could and not set(axes_in(spec)) & set(mesh):
            found[path] = bytes_per_device({"": leaf})
    told = ", ".join(f"{path} ({readable(size)})" for path, size in list(found.items())[:4])
    problem = f"on every device as a whole, though {' or '.join(axes)} could divide it: {told}; see `jaxops shardings`"
    return Finding.of(
        "replicated", problem if found else None, f"no array of {readable(large)} lies whole on every device", found
    )


def _constants(program: ClosedJaxpr) -> Iterator[Any]:
    """Yields the arrays that a program and the functions it calls close over, each once."""
    seen: set[int] = set()
    pending: list[Any] = [program]
    while pending:
        one = pending.pop()
        if isinstance(one, ClosedJaxpr):
            for x in one.consts:
                if hasattr(x, "shape") and id(x) not in seen:
                    seen.add(id(x))
                    yield x
            one = one.jaxpr
        for eqn in one.eqns:
            values = [
                v for value in eqn.params.values() for v in (value if isinstance(value, list | tuple) else (value,))
            ]
            pending += [value for value in values if isinstance(value, Jaxpr | ClosedJaxpr)]


def _bytes(x: Any) -> int:
    return (
        math.prod(x.shape) * np.dtype(x.dtype).itemsize
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
        else 0
    )


def collectives_finding(
    found: Sequence[Collective], state: State, microbatches: int, mesh: Mapping[str, int], *, coupled: bool
) -> Finding:
    """Checks that an update exchanges no more over the batch axes than its layout needs.

    Needed are the reduction of gradients, and for parameters sharded over fsdp three gathers and a reduction for each
    microbatch. What is more comes from activations that are gathered, or gradients that are reduced inside a loop.
    Over `tensor` and `sequence` nothing is bounded.

    Args:
      found: the collectives of the update.
      state: the abstract state, placed on the mesh.
      microbatches: number of microbatches.
      mesh: sizes of the mesh axes.
      coupled: whether the objective couples examples, whose activations are then gathered.
    """
    measured = [dataclasses.asdict(one) for one in found]
    if not any(size > 1 for size in mesh.values()):
        return Finding.skipped("collectives", "the mesh is one device")
    over_batch = [one for one in found if one.axes and set(one.axes) <= set(BATCH_AXES)]
    moved = sum(one.bytes for one in over_batch)
    sharded, whole = 0, 0
    for _, leaf in named_leaves({"params": state.params, "frozen": state.frozen}):
        size = bytes_per_device({"": leaf})
        if "fsdp" in axes_in(leaf.sharding.spec):
            sharded += size * mesh.get("fsdp", 1)
        else:
            whole += size
    exchanges = 4 * microbatches  # two gathers, that of recomputation, and the reduction
    passes = microbatches if sharded or mesh.get("tensor", 1) * mesh.get("sequence", 1) > 1 else 1
    need = whole * passes + sharded * exchanges
    bound = SLACK * need + LARGE
    loops = sum(one.bytes for one in over_batch if one.in_loop)
    told = f"{readable(moved)} over the batch axes, {readable(loops)} of it in loops; the layout needs {readable(need)}"
    named = ", ".join(f"{one.kind} over {' x '.join(one.axes)}: {readable(one.bytes)}" for one in over_batch[:2])
    if coupled or state.tables:
        return Finding("collectives", "passed", f"{told} (coupled examples and tables are not bounded)", measured)
    problem = f"{told}, so activations are gathered or gradients reduced in a loop ({named})" if moved > bound else None
    return Finding.of("collectives", problem, told, measured, bound)
