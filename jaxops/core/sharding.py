"""Sharding rules: a short list of (path pattern, axes) beside each model, and logical names for activations.

Every decision is reported. An axis that does not divide a dimension is dropped, and `Placement.dropped` says so. A
large parameter that no rule matches is an error, because replicating it silently is how memory runs out.
"""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxops.core.failures import UserError, nearest
from jaxops.core.mesh import AXES, BATCH_AXES

Axes = str | tuple[str, ...] | None
Rule = tuple[str, tuple[Axes, ...]]
"""(pattern, mesh axes of each dimension); the pattern is searched in the parameter's path, and the first match wins."""

LARGE = 2**20
"""The number of entries from which a parameter without a rule is an error."""

LOGICAL: Mapping[str, Axes] = {
    "batch": BATCH_AXES,
    "length": "sequence",
    "embed": None,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Default mesh axes of the logical activation names."""

_logical: contextvars.ContextVar[Mapping[str, Axes]] = contextvars.ContextVar("logical", default=LOGICAL)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The sharding of one parameter on the mesh.

    Attributes:
      path: the parameter's path.
      shape: its global shape.
      dtype: the name of its dtype.
      spec: its sharding, without the axes that were dropped.
      dropped: an explanation of each axis that was dropped, `fsdp does not divide 10`.
      bytes_per_device: the size of one shard.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    dropped: tuple[str, ...]
    bytes_per_device: int


def path_of(keys: Sequence[Any]) -> str:
    """Formats a key path as `blocks/0/attention/kernel`."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Returns (path, leaf) for every leaf, in tree order."""
    return [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def map_named(fn: Any, tree: PyTree) -> PyTree:
    """Maps `fn(path, leaf)` over a tree, as `jax.tree.map` does with the leaf alone."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: fn(path_of(keys), leaf), tree)


def _fit(shape: tuple[int, ...], axes: Sequence[Axes], mesh: Any) -> tuple[PartitionSpec, tuple[str, ...]]:
    """Returns the spec that `axes` asks for on this mesh, and an explanation of each axis that had to be dropped."""
    entries: list[Axes] = []
    dropped = []
    for size, wanted in zip(shape, axes, strict=False):
        kept: list[str] = []
        for axis in (wanted,) if isinstance(wanted, str) else wanted or ():
            ways = mesh.shape.get(axis, 1)
            if ways == 1:
                continue
            if size % (ways * math.prod(mesh.shape[a] for a in kept)) == 0:
                kept.append(axis)
            else:
                dropped.append(f"{axis} does not divide {size}")
        entries.append(tuple(kept) if len(kept) > 1 else (kept[0] if kept else None))
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries), tuple(dropped)


def axes_in(spec: Iterable[Axes]) -> list[str]:
    """Returns the mesh axes that a spec or a rule's axes name, in order."""
    return [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]


def _check_rule(rule: Rule) -> None:
    pattern, axes = rule
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"sharding: {pattern!r} is not a regular expression: {error}") from error
    named = axes_in(axes)
    for axis in named:
        if axis not in AXES:
            raise UserError(
                f"sharding: rule {rule} names no mesh axis: {axis} (known: {', '.join(AXES)}){nearest(axis, AXES)}"
            )
        if named.count(axis) > 1:
            raise UserError(f"sharding: rule {rule} names {axis} twice: it can divide one dimension only")


def place(params: PyTree, rules: Sequence[Rule], mesh: Mesh) -> list[Placement]:
    """Returns the placement of every parameter (arrays or ShapeDtypeStructs), in tree order.

    Raises:
      UserError: a rule is no regular expression, or names an axis that does not exist, an axis twice, or more
        dimensions than the parameter has; or a parameter of at least `LARGE` entries matches no rule.
    """
    for rule in rules:
        _check_rule(rule)
    out = []
    for path, leaf in named_leaves(params):
        shape = tuple(leaf.shape)
        found = next((rule for rule in rules if re.search(rule[0], path)), None)
        if found is None and math.prod(shape) >= LARGE:
            raise UserError(
                f"sharding: no rule matches parameter {path} {shape}, too large to replicate unasked;"
                f" add one, for example ['{re.escape(path.rsplit('/', 1)[-1])}', [fsdp]] (or [] to replicate it)"
            )
        axes = found[1] if found else ()
        if len(axes) > len(shape):
            raise UserError(f"sharding: rule {found} has {len(axes)} dimensions, parameter {path} has {len(shape)}")
        spec, dropped = _fit(shape, axes, mesh)
        shards = math.prod(mesh.shape[axis] for axis in axes_in(spec))
        size = math.prod(shape) * leaf.dtype.itemsize // shards
        out.append(Placement(path, shape, str(leaf.dtype), spec, dropped, size))
    return out


def parameter_shardings(params: PyTree, rules: Sequence[Rule], mesh: Mesh) -> PyTree:
    """Returns the `NamedSharding` of every parameter, as a tree like `params`; raises the errors of `place`."""
    specs = [NamedSharding(mesh, placement.spec) for placement in place(params, rules, mesh)]
    return jax.tree.unflatten(jax.tree.structure(params), specs)


@contextlib.contextmanager
def logical_axes(rules: Mapping[str, Axes]) -> Iterator[None]:
    """Makes `constrain` map its names by `rules`, over the defaults, while a function is traced inside.

    Raises:
      UserError: a name is mapped to an axis that does not exist.
    """
    for name, axes in rules.items():
        for axis in axes_in((axes,)):
            if axis not in AXES:
                raise UserError(
                    f"sharding: logical name {name!r} names no mesh axis: {axis}{nearest(axis, AXES)}"
                    f" (known: {', '.join(AXES)})"
                )
    token = _logical.set({**LOGICAL, **rules})
    try:
        yield
    finally:
        _logical.reset(token)


def logical_spec(shape: tuple[int, ...], names: Sequence[str | None], mesh: Any) -> PartitionSpec:
    """Returns the spec on this mesh that `constrain` gives an array of this shape by the same names.

    Raises:
      ValueError: a name is unknown, or the number of names is not the number of dimensions.
    """
    if len(names) != len(shape):
        raise ValueError(f"constrain: {len(names)} names {tuple(names)} for an array of rank {len(shape)}")
    rules = _logical.get()
    unknown = [name for name in names if name is not None and name not in rules]
    if unknown:
        raise ValueError(f"constrain: unknown logical names {unknown} (known: {', '.join(rules)})")
    return _fit(shape, [rules[name] if name else None for name in names], mesh)[0]


def constrain(x: Array, names: Sequence[str | None]) -> Array:
    """Constrains the sharding of an activation or a kernel by a logical name (or None) for each dimension.

    Where there is no mesh, or inside a manual `shard_map`, it does nothing, so a model needs no mesh to run.

    Raises:
      ValueError: a name is unknown, or the number of names is not the rank of `x`.

    Example:
      kernel = jaxops.constrain(params["kernel"], ("embed", "mlp"))  # gathered over fsdp where it is used
      hidden = jaxops.constrain(x @ kernel, ("batch", "length", "mlp"))
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = logical_spec(x.shape, names, mesh)
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return x
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def on_whole_arrays(
    name: str, function: Callable[..., Any], out: Any, logical: Mapping[str, Axes] | None = None
) -> Callable[..., Any]:
    """Returns the function as it is to be jitted: it sees whole arrays, since its axes are auto.

    Args:
      name: the name of the program in profiles and messages.
      function: any pure function.
      out: the sharding of its results.
      logical: mesh axes of the logical names in `constrain`, over the defaults.
    """

    def whole(*given: Any) -> Any:
        with logical_axes(logical or {}):
            return function(*given)

    run = jax.sharding.auto_axes(whole, out_sharding=out)

    def named(*given: Any) -> Any:
        return run(*given)

    named.__name__ = name
    return named


def pattern_below(prefix: str, pattern: str) -> str:
    """Returns a path pattern of a model as one for the same paths below `prefix/`."""
    if pattern.startswith("^"):
        return f"^{prefix}/(?:{pattern[1:].replace('|^', '|')})"
    return f"^{prefix}/.*(?:{pattern})"


def rules_below(prefix: str, rules: Sequence[Rule]) -> list[Rule]:
    """Returns sharding rules of a model as rules for the same parameters below `prefix/`."""
    return [(pattern_below(prefix, pattern), axes) for pattern, axes in rules]
