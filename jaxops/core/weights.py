"""Weights in: named arrays of files and checkpoints, renamed, straight onto the sharding of what is trained.

Several sources may fill one tree (a policy and its reference from one file, a reward model from another). Each device
gets its own slices and only those are read; nothing is whole on a host. What becomes of every target is known
(`plan`) before anything is read. Held by tests/core/test_weights.py.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jaxtyping import PyTree

from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import UserError
from jaxops.core.named_arrays import Arrays, HostArrays, SavedArrays, Wanted
from jaxops.core.safetensors import open_safetensors
from jaxops.core.sharding import map_named, named_leaves

Targets = Mapping[str, jax.ShapeDtypeStruct]
"""What is to be filled: path -> shape, dtype and sharding; numpy arrays are made where there is no sharding."""
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Rename:
    """A rule from a source's names to target paths: `pattern` is replaced where it is found, once, as by `re.sub`.

    With `transpose` the last two dimensions are swapped on the way, as PyTorch's linear layers ([out, in]) need; a
    vector stays as it is.
    """

    pattern: str
    replacement: str
    transpose: bool = False


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Named arrays, and what they are called here.

    A name goes by the first of its rules that leads to a target; without rules it is the target's path itself.

    Attributes:
      name: what messages call it.
      arrays: where they come from.
      rename: rules.
      match: only names are taken in which this pattern is found.
    """

    name: str
    arrays: Arrays
    rename: Sequence[Rename] = ()
    match: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of each target.

    Attributes:
      loaded: target -> (index of the source, name there, whether it is transposed).
      skipped: target -> its shapes, there and here, that differ.
      left: targets that no source has.
      names: of the sources.
    """

    loaded: Mapping[str, tuple[int, str, bool]]
    skipped: Mapping[str, str]
    left: tuple[str, ...]
    names: tuple[str, ...]

    def __str__(self) -> str:
        count = [sum(source == at for source, _, _ in self.loaded.values()) for at in range(len(self.names))]
        parts = [f"{number} arrays from {name}" for number, name in zip(count, self.names, strict=True)]
        if self.skipped:
            parts.append(f"skipped for their shape: {_some(self._skipped())}")
        if self.left:
            parts.append(f"left fresh: {_some(self.left)}")
        return "; ".join(parts)

    def _skipped(self) -> list[str]:
        return [f"{target} {shapes}" for target, shapes in self.skipped.items()]


def from_safetensors(
    path: str | os.PathLike[str], rename: Sequence[Rename] = (), match: str = "", name: str | None = None
) -> WeightSource:
    """A safetensors file, or a folder of shards, as a source; only its headers are read.

    Args:
      rename: rules from its names to target paths.
      match: only names are taken in which this pattern is found.
      name: what messages call it; its path if not given.

    Raises:
      UserError: as `open_safetensors` does.
    """
    return WeightSource(name or os.fspath(path), HostArrays(open_safetensors(path)), rename, match)


def from_checkpoint(
    checkpoints: Checkpoints,
    step: int,
    rename: Sequence[Rename] = (),
    match: str = "",
    name: str | None = None,
    inside: Sequence[str] = ("params", "frozen"),
) -> WeightSource:
    """The parameters of a checkpoint as a source; only its manifest is read.

    Args:
      step: a saved step.
      rename: rules from its paths (below `inside`) to target paths.
      match: only paths are taken in which this pattern is found.
      name: what messages call it.
      inside: the parts of the state whose arrays are taken; a path begins below them.

    Raises:
      UserError: no such step, or its manifest is damaged.
    """
    return WeightSource(name or f"step {step}", SavedArrays(checkpoints, step, inside), rename, match)


def targets_of(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a tree (arrays or ShapeDtypeStructs) as targets, by path."""
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
        for path, leaf in named_leaves(tree)
    }


def plan(targets: Targets, sources: Sequence[WeightSource]) -> Plan:
    """Which array of which source goes to each target, from names, shapes and dtypes alone.

    Raises:
      UserError: a rule or match is no pattern, two arrays lead to one target, a dtype would lose its sort (float to
        int), or nothing of a source fits; the message has names of both sides.
    """
    shapes = [source.arrays.shapes() for source in sources]
    claims: dict[str, list[tuple[int, str, bool]]] = {}
    for at, source in enumerate(sources):
        for name in shapes[at]:
            if _found(source, source.match, name) and (to := _renamed(source, name, targets)) is not None:
                claims.setdefault(to[0], []).append((at, name, to[1]))
    loaded, skipped = {}, {}
    for target, like in targets.items():
        claim, *others = claims.get(target, [None])
        if others:
            both = " and ".join(f"{name} of {sources[at].name}" for at, name, _ in claims[target][:3])
            raise UserError(f"weights: {both} both lead to {target}: narrow a rule or `match` until one of them does")
        if claim is None:
            continue
        at, name, transpose = claim
        there = shapes[at][name]
        shape = (*there.shape[:-2], *there.shape[-2:][::-1]) if transpose else there.shape
        if shape != like.shape:
            turned = " transposed" if transpose else ""
            skipped[target] = f"{list(shape)}{turned} there, {list(like.shape)} here"
            continue
        if not _castable(there.dtype, like.dtype):
            raise UserError(
                f"weights: {name} of {sources[at].name} is {there.dtype}, but {target} is {like.dtype}: only floats go"
                " to floats, and integers to larger ones"
            )
        loaded[target] = claim
    left = tuple(target for target in targets if target not in loaded and target not in skipped)
    found = Plan(loaded, skipped, left, tuple(source.name for source in sources))
    for at, source in enumerate(sources):
        if not any(index == at for index, _, _ in loaded.values()):
            raise UserError(_nothing_fits(source, list(shapes[at]), list(targets), found))
    return found


def load_weights(targets: Targets, sources: Sequence[WeightSource]) -> tuple[dict[str, Any], Plan]:
    """The arrays that `sources` have for `targets`, by path, as the targets are: dtype and sharding; and the plan.

    Every process of a job calls it, and reads what its devices hold. `with_arrays` puts the arrays into a tree.

    Raises:
      UserError: as `plan` does, before anything is read; or numbers do not fit into the dtype here.
    """
    found = plan(targets, sources)
    arrays: dict[str, Any] = {}
    for at, source in enumerate(sources):
        names = {name: target for target, (index, name, _) in found.loaded.items() if index == at}
        wanted = {name: Wanted(_concrete(targets[target]), found.loaded[target][2]) for name, target in names.items()}
        arrays |= {names[name]: array for name, array in source.arrays.load(wanted).items()}
    return {target: arrays[target] for target in found.loaded}, found


def with_arrays(tree: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """The tree with these arrays at their paths, and its own leaves elsewhere."""
    return map_named(lambda path, leaf: arrays.get(path, leaf), tree)


def cast_by_path(tree: PyTree, rules: Sequence[tuple[str, Any]], default: Any = None) -> PyTree:
    """Floating leaves (arrays or ShapeDtypeStructs) in the dtype of the first rule whose pattern their path has.

    The others are in `default`, or as they are where that is None; integers and booleans always stay. For example
    `cast_by_path(params, [("lora", "float32")], "bfloat16")` is a bfloat16 base under float32 adapters.

    Raises:
      UserError: a pattern is none or is found in no path, or a dtype is not a floating one.
    """
    paths = [path for path, _ in named_leaves(tree)]
    compiled = []
    for pattern, dtype in rules:
        if not any(_search(f"dtypes: {pattern!r}", pattern, path) for path in paths):
            raise UserError(f"dtypes: {pattern!r} is found in no path (there are: {_some(paths)})")
        compiled.append((re.compile(pattern), _floating(dtype)))
    other = None if default is None else _floating(default)

    def one(path: str, leaf: Any) -> Any:
        dtype = next((dtype for pattern, dtype in compiled if pattern.search(path)), other)
        if dtype is None or dtype == leaf.dtype or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        return leaf.astype(dtype)

    return map_named(one, tree)


def _floating(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise UserError(f"dtypes: {dtype!r} is no floating dtype (float32, bfloat16, float16, ...)")
    return found


def _search(what: str, pattern: str, text: str) -> re.Match[str] | None:
    try:
        return re.search(pattern, text)
    except re.error as error:
        raise UserError(f"{what} is not a regular expression: {error}") from error


def _found(source: WeightSource, pattern: str, name: str) -> bool:
    return _search(f"weights: {pattern!r} of {source.name}", pattern, name) is not None


def _renamed(source: WeightSource, name: str, targets: Collection[str]) -> tuple[str, bool] | None:
    """The target that a name leads to by the first rule that leads to one, and whether it is transposed."""
    if not source.rename:
        return (name, False) if name in targets else None
    for rule in source.rename:
        if not _found(source, rule.pattern, name):
            continue
        try:
            path = re.sub(rule.pattern, rule.replacement, name, count=1)
        except (re.error, IndexError) as error:
            raise UserError(
                f"weights: {rule.replacement!r} of {source.name} is no replacement for {rule.pattern!r}: {error}"
            ) from error
        if path in targets:
            return path, rule.transpose
    return None


def _castable(there: Any, here: Any) -> bool:
    """Whether a dtype may become another: floats any floats, the rest only what holds all of its values."""
    for sort in (jnp.floating, jnp.integer):
        if jnp.issubdtype(there, sort):
            return jnp.issubdtype(here, sort) and (sort is jnp.floating or np.can_cast(there, here, "safe"))
    return there == here


def _nothing_fits(source: WeightSource, names: list[str], targets: list[str], found: Plan) -> str:
    matching = [name for name in names if _found(source, source.match, name)]
    text = f"weights: nothing of {source.name} fits"
    if found.skipped:
        text += f"; skipped for their shape: {_some(found._skipped())}"
    if names and not matching:
        return f"{text}: no name has {source.match!r} in it; it has {_some(names)}"
    renamed = [_first_name(source, name) for name in matching[:_SHOWN]]
    rules = " (as renamed)" if source.rename else ""
    return f"{text}: it has {_some(renamed, len(matching))}{rules}; wanted are {_some(targets)}"


def _first_name(source: WeightSource, name: str) -> str:
    """What the first rule that applies makes of a name that led to no target."""
    rule = next((rule for rule in source.rename if re.search(rule.pattern, name)), None)
    return name if rule is None else re.sub(rule.pattern, rule.replacement, name, count=1)


def _some(names: Sequence[str], count: int | None = None) -> str:
    shown = names[:_SHOWN]
    more = (len(names) if count is None else count) - len(shown)
    return (", ".join(shown) or "nothing") + (f", ... and {more} more" if more > 0 else "")


def _concrete(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The target with its sharding on the devices of `jax.set_mesh`, where it was on an abstract mesh."""
    sharding = like.sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)
