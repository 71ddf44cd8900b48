"""The cost of a step: parameters, microbatches, exact FLOPs, and the share of the chip's peak that was used."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxops.core.flops import count_flops, mfu
from jaxops.core.loop import Window
from jaxops.core.memory import bytes_per_device, readable, state_groups
from jaxops.core.state import State, split
from jaxops.core.step import Step
from jaxops.run.task import Task


def memory_line(state: State, models: Sequence[str]) -> str:
    """Returns one line for people: the bytes that a state and its gradients take on each device, by group.

    Args:
      state: the state, abstract or not.
      models: the beginnings of the paths of models that are told apart.
    """
    groups = state_groups(state, models)
    groups["gradients"] = bytes_per_device(state.params)
    told = ", ".join(f"{name} {readable(size)}" for name, size in groups.items())
    return f"memory on each device, activations apart: {told}; together {readable(sum(groups.values()))}"


class Accounting:
    """Counts the FLOPs of a step once, then turns windows of the loop into rates.

    Attributes:
      flops: FLOPs of one step over all devices; None until `measure` was called.
      programs: the names of the step's compiled programs.
    """

    def __init__(self, task: Task, mesh: Mesh, accumulation: int):
        self._task, self._mesh, self._accumulation = task, mesh, accumulation
        self.flops: float | None = None
        self.programs: list[str] = []

    def describe(self, step: Step) -> str:
        """Returns one line for people: parameters, examples, batch, microbatches and where gradients are reduced."""
        size = self._task.config.batch.global_
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self._task.model.shapes))
        rows = sum(spec.rows * spec.dim for spec in self._task.tables.values())
        known = f"{count + rows:,} parameters" + (f" ({rows:,} of them in tables)" if rows else "")
        if patterns := (*self._task.config.optimizer.frozen, *self._task.frozen):
            trained = sum(
                math.prod(leaf.shape) for leaf in jax.tree.leaves(split(self._task.model.shapes, patterns)[0])
            )
            known += f", {trained + rows:,} of them trained"
        parts = [known, f"{self._task.source.examples:,} examples an epoch", f"batch {size}"]
        if self._accumulation > 1:
            parts.append(f"in {self._accumulation} microbatches ({getattr(step, 'reason', '')})")
        return ", ".join(parts)

    def measure(self, step: Step, state: Any, batch: Any) -> None:
        """Counts the FLOPs of one step over all its programs; the arguments may be abstract."""
        programs = step.programs(state, batch)
        self.programs = [program.name for program in programs]
        self.flops = float(sum(program.times * count_flops(program.fn, *program.args).total for program in programs))

    def rates(self, window: Window) -> dict[str, float]:
        """Returns TFLOP/s over all devices, and MFU where the chip's peak is known."""
        if self.flops is None:
            return {}
        seconds = window.seconds / window.timed
        out = {"tflops_per_s": self.flops / seconds / 1e12}
        devices = list(self._mesh.devices.flat)
        used = mfu(self.flops, seconds, devices, self._task.config.precision.compute)
        if used is not None:
            out["mfu"] = used
        return out
