"""One program of a step on a mesh that is not here: what it will hold, and what the compiler says of it."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxops.core.cache import cache_root
from jaxops.core.flops import count_flops
from jaxops.core.memory import bytes_per_device
from jaxops.core.sharding import named_leaves
from jaxops.core.state import State
from jaxops.core.turn import Program
from jaxops.core.whole_files import replace_file
from jaxops.plan.collectives import Collective, collectives
from jaxops.plan.estimate import Shards, temporaries

FULL = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's word on a program, in bytes of a device.

    Attributes:
      seconds: how long it compiled.
      arguments: what it is given.
      temporaries: what it needs meanwhile; None where it did not fit.
      outputs: what it returns.
      aliased: the part of the outputs that takes the place of arguments, which were donated.
      donated: bytes of the arguments that the program donates.
      collectives: by kind and mesh axes.
      problem: why it does not compile; None where it does.
      cached: whether this was known from an earlier plan.
    """

    seconds: float
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    aliased: int = 0
    donated: int = 0
    collectives: Sequence[Collective] = ()
    problem: str | None = None
    cached: bool = False

    @property
    def peak(self) -> int:
        """The bytes that the program takes while it runs."""
        return self.arguments + self.temporaries + self.outputs - self.aliased

    @property
    def donation_works(self) -> bool:
        """Whether nearly all that is donated is used again: layouts of small arrays may differ."""
        return self.aliased >= 0.99 * self.donated


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program of a step.

    Attributes:
      name: its name.
      times: how often a step runs it.
      flops: FLOPs of one run over all devices.
      uncounted: what of it could not be counted.
      arguments: predicted bytes of the arguments that it reads, on a device.
      of_state: those of them that are of the state.
      of_tables: those of the state that are of embedding tables, of which a step reads and writes some rows alone.
      beside: by name, predicted bytes that lie beside the state while it runs.
      inputs: predicted bytes of its other arguments.
      gradients: bytes of gradients, where it is an update.
      temporaries: estimated bytes of temporaries, gradients apart.
      compiled: the compiler's word; None where nothing was compiled.
    """

    name: str
    times: int
    flops: float
    uncounted: tuple[str, ...]
    arguments: int
    of_state: int
    of_tables: int
    beside: Mapping[str, int]
    inputs: int
    gradients: int
    temporaries: int
    compiled: Compiled | None = None


def placed(tree: Any, mesh: Mesh) -> Any:
    """Returns abstract arrays on the devices of the mesh; what has no sharding lies whole on each."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        if not isinstance(x, jax.ShapeDtypeStruct):
            x = np.asarray(x)
            x = jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
        spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec), weak_type=x.weak_type)

    return jax.tree.map(one, tree)


class Traced:
    """A program that was traced for a mesh, before it is compiled; make it inside `jax.set_mesh(mesh)`.

    Args:
      program: the program.
      state: the abstract state, whose arrays are known by identity among the arguments.
      mesh: the mesh of the devices.
      shards: how arrays inside are assumed to be divided.
    """

    def __init__(self, program: Program, state: State, mesh: Mesh, shards: Shards):
        self.program, self._mesh = program, mesh
        self._traced = program.fn.trace(*placed(program.args, mesh))
        self.jaxpr = jaxpr = self._traced.jaxpr
        used = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[1]
        own = {id(leaf) for leaf in jax.tree.leaves(state)}
        beside = {name: {id(leaf) for leaf in jax.tree.leaves(tree)} for name, tree in program.beside.items()}
        leaves = list(zip(jax.tree.leaves(program.args), used, strict=True))
        size = lambda leaf: bytes_per_device(placed(leaf, mesh))
        flops = count_flops(jaxpr)
        of_state = sum(size(leaf) for leaf, reads in leaves if reads and id(leaf) in own)
        rows = {id(leaf) for leaf in jax.tree.leaves(state.tables)}
        of_tables = sum(size(leaf) for leaf, reads in leaves if reads and id(leaf) in rows)
        held = {name: sum(size(leaf) for leaf, _ in leaves if id(leaf) in ids) for name, ids in beside.items()}
        known = own.union(*beside.values())
        inputs = sum(size(leaf) for leaf, reads in leaves if reads and id(leaf) not in known)
        update = bool(program.args) and isinstance(program.args[0], State)
        self.plan = ProgramPlan(
            program.name,
            program.times,
            float(flops.total),
            tuple(name for name in flops.unknown if not name.startswith("while loop")),
            sum(size(leaf) for leaf, reads in leaves if reads),
            of_state,
            of_tables,
            held,
            inputs,
            bytes_per_device(program.args[0].params) if update else 0,
            temporaries(jaxpr, shards),
        )

    def compiled(self, version: str, slices: int) -> ProgramPlan:
        """Returns the plan with the compiler's word, from the cache where the very same program was asked before.

        Args:
          version: tells compilers and topologies apart.
          slices: number of slices of the mesh.
        """
        lowered = self._traced.lower()
        digest = hashlib.sha256(f"{version}\n{lowered.as_text()}".encode()).hexdigest()
        kept = cache_root() / "plan" / f"{digest}.json"
        found = _read(kept)
        if found is None:
            found = self._compile(lowered, slices)
            if found.problem is None:
                _keep(kept, found)
        return dataclasses.replace(self.plan, compiled=found)

    def _compile(self, lowered: Any, slices: int) -> Compiled:
        began = time.monotonic()
        donated = sum(
            bytes_per_device(placed(leaf, self._mesh))
            for leaf, info in zip(jax.tree.leaves(self.program.args), jax.tree.leaves(lowered.args_info), strict=True)
            if info.donated
        )
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not any(word in str(error) for word in FULL):
                raise
            return Compiled(time.monotonic() - began, problem=_first_line(str(error)))
        memory = compiled.memory_analysis()
        return Compiled(
            seconds=time.monotonic() - began,
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            donated=donated,
            collectives=collectives(compiled.as_text(), dict(self._mesh.shape), slices),
        )


def _keep(path: Path, found: Compiled) -> None:
    """Writes what the compiler said, for the next plan; a full disk or a cache that is read-only is no trouble."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [json.dumps(dataclasses.asdict(found)).encode()])


def _read(path: Path) -> Compiled | None:
    """Returns what an earlier plan learnt; None where there is nothing, or nothing readable."""
    try:
        values = json.loads(path.read_text())
        exchanged = [Collective(**{**one, "axes": tuple(one["axes"])}) for one in values.pop("collectives")]
        return Compiled(**{**values, "collectives": exchanged, "cached": True})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "memory" in line.lower()]
    return (lines[0] if lines else text)[:400]


def shards_of(params: Any, rows: Sequence[int], batch: int) -> Shards:
    """Returns how arrays of a step's programs are assumed to be divided.

    Args:
      params: parameters, abstract and placed.
      rows: the numbers of examples that its programs read at a time.
      batch: the number of batch shards of the mesh.
    """
    ways = {
        tuple(leaf.shape): leaf.size // max(int(np.prod(leaf.sharding.shard_shape(leaf.shape))), 1)
        for _, leaf in named_leaves(params)
        if leaf.size
    }
    return Shards({shape: many for shape, many in ways.items() if len(shape) > 1}, frozenset(rows), batch)
