"""Weight loading: named arrays of files and checkpoints are renamed and placed onto the sharding of the training state.

Several sources may fill one tree (a policy and its reference from one file, a reward model from another). Each device
gets its own slices and only those are read; no host holds a whole array. `plan` decides about every target before
anything is read. Tested in tests/core/test_weights.py.
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
"""The arrays to fill: path -> shape, dtype and sharding; without a sharding a numpy array is made."""
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Rename:
    """A rule from a source's names to target paths.

    Attributes:
      pattern: regular expression; its first match in a name is replaced.
      replacement: replacement text, as in `re.sub`.
      transpose: swap the last two dimensions, as PyTorch's linear layers ([out, in]) need; a vector stays as it is.
    """

    pattern: str
    replacement: str
    transpose: bool = False


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Named arrays with the rules that map their names to target paths.

    A name uses the first rule that leads to a target; without rules the name itself is the target's path.

    Attributes:
      name: name of the source in messages.
      arrays: the named arrays.
      rename: rules from names to target paths.
      match: only names in which this pattern is found are taken.
      below: the targets' paths begin with this, before what the rules lead to (`policy/`).
    """

    name: str
    arrays: Arrays
    rename: Sequence[Rename] = ()
    match: str = ""
    below: str = ""


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """The decision for each target: loaded from a source, skipped, or left as it is.

    Attributes:
      loaded: target -> (index of the source, name in the source, whether it is transposed).
      skipped: target -> text with the two shapes, in the source and in the target, which differ.
      left: targets that no source has.
      names: names of the sources.
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
    """Returns a safetensors file, or a folder of shards, as a source; only its headers are read.

    Args:
      path: the file or folder.
      rename: rules from its names to target paths.
      match: only names in which this pattern is found are taken.
      name: name of the source in messages; its path if not given.

    Raises:
      UserError: the errors of `open_safetensors`.
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
    """Returns the parameters of a checkpoint as a source; only its manifest is read.

    Args:
      checkpoints: the checkpoints of a run.
      step: a saved step.
      rename: rules from its paths (below `inside`) to target paths.
      match: only paths in which this pattern is found are taken.
      name: name of the source in messages; `step N` if not given.
      inside: the entries of the state whose arrays are taken; a path begins below them.

    Raises:
      UserError: the step was not saved, or its manifest is damaged.
    """
    return WeightSource(name or f"step {step}", SavedArrays(checkpoints, step, inside), rename, match)


def targets_of(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the leaves of a tree (arrays or ShapeDtypeStructs) as targets, by path."""
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
        for path, leaf in named_leaves(tree)
    }


def plan(targets: Targets, sources: Sequence[WeightSource]) -> LoadPlan:
    """Decides which array of which source goes to each target, from names, shapes and dtypes alone.

    Raises:
      UserError: a rule or `match` is not a regular expression, two arrays lead to one target, a dtype would change its
        kind (float to int), or no array of a source fits. The message has names of both sides.
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
    found = LoadPlan(loaded, skipped, left, tuple(source.name for source in sources))
    for at, source in enumerate(sources):
        if not any(index == at for index, _, _ in loaded.values()):
            raise UserError(_nothing_fits(source, list(shapes[at]), list(targets), found))
    return found


def load_weights(targets: Targets, sources: Sequence[WeightSource]) -> tuple[dict[str, Any], LoadPlan]:
    """Loads the arrays that `sources` have for `targets`, and returns them by path, with the plan.

    Each array has the dtype and sharding of its target. Every process of a job must call this function, and each reads
    the parts that its devices hold. `with_arrays` puts the arrays into a tree.

    Raises:
      UserError: `plan` raises it, before anything is read; or numbers do not fit into the dtype of their target.
    """
    found = plan(targets, sources)
    arrays: dict[str, Any] = {}
    for at, source in enumerate(sources):
        names = {name: target for target, (index, name, _) in found.loaded.items() if index == at}
        wanted = {name: Wanted(_concrete(targets[target]), found.loaded[target][2]) for name, target in names.items()}
        arrays |= {names[name]: array for name, array in source.arrays.load(wanted).items()}
    return {target: arrays[target] for target in found.loaded}, found


def with_arrays(tree: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """Returns the tree with these arrays at their paths, and its own leaves elsewhere."""
    return map_named(lambda path, leaf: arrays.get(path, leaf), tree)


def cast_by_path(tree: PyTree, rules: Sequence[tuple[str, Any]], default: Any = None) -> PyTree:
    """Casts floating leaves (arrays or ShapeDtypeStructs) to the dtype of the first rule that is found in their path.

    Other floating leaves are cast to `default`, or stay as they are if it is None; integers and booleans always stay.
    For example `cast_by_path(params, [("lora", "float32")], "bfloat16")` gives a bfloat16 base with float32 adapters.

    Raises:
      UserError: a pattern is not a regular expression or is found in no path, or a dtype is not a floating one.
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
        if dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        return leaf.astype(dtype)  # also where it has this dtype, weakly: a step would be compiled twice

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
    """Returns the target of a name, by the first rule that leads to one, and whether the array is transposed."""
    if not source.rename:
        return (source.below + name, False) if source.below + name in targets else None
    for rule in source.rename:
        if not _found(source, rule.pattern, name):
            continue
        try:
            path = source.below + re.sub(rule.pattern, rule.replacement, name, count=1)
        except (re.error, IndexError) as error:
            raise UserError(
                f"weights: {rule.replacement!r} of {source.name} is no replacement for {rule.pattern!r}: {error}"
            ) from error
        if path in targets:
            return path, rule.transpose
    return None


def _castable(there: Any, here: Any) -> bool:
    """Returns whether a dtype may be cast to another: floats to any floats, other dtypes only without loss."""
    for sort in (jnp.floating, jnp.integer):
        if jnp.issubdtype(there, sort):
            return jnp.issubdtype(here, sort) and (sort is jnp.floating or np.can_cast(there, here, "safe"))
    return there == here


def _nothing_fits(source: WeightSource, names: list[str], targets: list[str], found: LoadPlan) -> str:
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
    """Returns a name that led to no target as the first rule that matches renames it."""
    rule = next((rule for rule in source.rename if re.search(rule.pattern, name)), None)
    return source.below + (name if rule is None else re.sub(rule.pattern, rule.replacement, name, count=1))


def _some(names: Sequence[str], count: int | None = None) -> str:
    shown = names[:_SHOWN]
    more = (len(names) if count is None else count) - len(shown)
    return (", ".join(shown) or "nothing") + (f", ... and {more} more" if more > 0 else "")


def _concrete(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the target with a sharding on an abstract mesh moved to the mesh of `jax.set_mesh`."""
    sharding = like.sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)
