"""The step of policy optimisation: collect, score, advantage, update; the loop drives it like any other step.

Collecting and scoring are asked of a `Collector` (rl/collect.py). Advantages are computed once, by one program, from
log-probabilities and values that training itself computes. The updates are an unchanged `TrainStep`. Until the first
update nothing of the state has been given away, so an interrupted step has not been.
Tested in tests/rl/test_policy_updates.py; the docs list each known trap with the test that holds it (docs/rlhf.md).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from jaxops.core.accumulate import microbatches
from jaxops.core.interrupt import Interrupted
from jaxops.core.journal import Journal
from jaxops.core.mesh import batch_axes, serialise_dispatch
from jaxops.core.rows import abstract_placed
from jaxops.core.sharding import Axes, on_whole_arrays
from jaxops.core.state import Params, State, join
from jaxops.core.step import Extra, TrainStep, cast
from jaxops.core.sums import Max, Sum, Sums, merge
from jaxops.core.turn import Program, Turn, advanced
from jaxops.models.policy import PolicyModel
from jaxops.objectives.policy import kl_estimate
from jaxops.rl.algorithms import Algorithm, Rollout, importance
from jaxops.rl.collect import Collector, abstract_scores
from jaxops.rl.kl import adapted
from jaxops.rl.ptx import PTX, PtxRows
from jaxops.rl.rollout import abstract_rollout, placed

KL, SCORES = "kl", "scores"
"""The names of the KL coefficient and of the running statistics of scores in `State.extra`."""
ORDER = 0x0DE5
"""Folded into keys of the order of completions, so that they share none with a sampled token."""


class UpdateParts(NamedTuple):
    """The parts that a step of policy optimisation gets from the run that drives it.

    Attributes:
      update: the built TrainStep of the algorithm's objective.
      mesh: the mesh of the state.
      journal: returns the journal of the run, once a step is called.
    """

    update: TrainStep
    mesh: Mesh
    journal: Callable[[], Journal | None]


def policy_extras(algorithm: Algorithm) -> dict[str, Extra]:
    """Returns what the step keeps in the state beside parameters: only the step itself changes it."""
    zero = lambda params: {name: jnp.zeros((), jnp.float32) for name in ("count", "mean", "squares")}
    extras = {KL: Extra(init=lambda params: {"coefficient": jnp.float32(algorithm.kl.coef)})}
    return extras | ({SCORES: Extra(init=zero)} if algorithm.score_scale == "running" else {})


def ready_shapes(algorithm: Algorithm, completions: int, width: int, longest: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of the batch that one update reads.

    Args:
      algorithm: the algorithm.
      completions: the number of completions of a step.
      width: number of tokens that prompts have room for.
      longest: number of tokens that completions have room for.
    """
    size = completions // algorithm.minibatches
    found = dict(abstract_rollout(size, width, longest))
    kept = {name: found[name] for name in ("id", "tokens", "length", "end", "completion", "mask")}
    tokens = ["old", "advantages"]
    tokens += ["values", "returns"] if algorithm.has_values else []
    tokens += ["reference"] if algorithm.penalises and algorithm.kl.in_ == "loss" else []
    kept |= dict.fromkeys(tokens, found["mask"])
    rows = jax.ShapeDtypeStruct((size,), np.float32)
    return kept | {"policy_on": rows, "coefficient": rows}


def drawn_batch(algorithm: Algorithm, completions: int, width: int, longest: int, vocab: int) -> dict[str, np.ndarray]:
    """Returns a batch of `ready_shapes` whose values are drawn: what an audit differentiates without sampling anything.

    Args:
      algorithm: the algorithm.
      completions: the number of completions of a step.
      width: number of tokens that prompts have room for.
      longest: number of tokens that completions have room for.
      vocab: number of token ids.
    """
    draw = np.random.default_rng(0)
    shapes = ready_shapes(algorithm, completions, width, longest)
    (size,) = shapes["id"].shape
    written = draw.integers(1, longest + 1, size)
    found: dict[str, np.ndarray] = {
        "id": np.arange(size),
        "length": draw.integers(1, width + 1, size),
        "mask": np.arange(longest)[None] < written[:, None],
        "policy_on": np.ones(size),
        "coefficient": np.full(size, 0.05),
    }
    found["end"] = found["length"] + written
    for name, shape in shapes.items():
        if name in ("tokens", "completion"):
            found[name] = draw.integers(0, vocab, shape.shape)
        elif name not in found:
            likely = -np.log(vocab) if name in ("old", "reference") else 0.0
            found[name] = likely + 0.5 * draw.normal(size=shape.shape)
    return {name: found[name].astype(shape.dtype) for name, shape in shapes.items()}


class PolicyStep:
    """One iteration of policy optimisation, as the loop's step.

    Args:
      parts: what the run gives.
      model: the models.
      algorithm: the algorithm.
      collector: samples completions and scores them.
      compute_dtype: the dtype that models compute in.
      logical: mesh axes of logical names, over the defaults.
      text: the rows of text that updates read beside completions; None where the objective has no `loss/ptx`.
    """

    def __init__(
        self,
        parts: UpdateParts,
        model: PolicyModel,
        algorithm: Algorithm,
        collector: Collector,
        *,
        compute_dtype: Any = jnp.float32,
        logical: Mapping[str, Axes] | None = None,
        text: PtxRows | None = None,
    ) -> None:
        self.parts, self.model, self.algorithm, self.collector = parts, model, algorithm, collector
        self.text = text
        self._dtype, rows = compute_dtype, P(batch_axes(parts.mesh))
        whole = NamedSharding(parts.mesh, P())
        program = lambda name, function, out: jax.jit(on_whole_arrays(f"policy_{name}", function, out, logical))
        self._prepare = program("prepare", self._prepared, rows)
        self._advantages = program("advantages", self._learnt, (rows, P(), P(), P()))
        self._cut = program("cut", self._minibatches, rows)
        self._adapt = jax.jit(self._adapted, out_shardings=whole)
        self._merge = jax.jit(merge)

    def __call__(
        self, state: State, batch: Mapping[str, Any], window: Sums | None = None, turn: Turn | None = None
    ) -> tuple[State, Sums]:
        """Collects completions for a batch of prompts, scores them, and learns from them; see `core.turn.Step`."""
        assert turn is not None
        step, algorithm = int(state.step), self.algorithm
        collected = self.collector.collect(
            join(state.params, state.frozen), batch, step, turn, self.parts.journal(), algorithm
        )
        if turn.poll():
            raise Interrupted
        rollout = placed(collected.rollout, self.parts.mesh)
        prepared = self._run(self._prepare, state.params, state.frozen, rollout)
        scores = placed(collected.arrays, self.parts.mesh)
        extras = {name: state.extra[name] for name in (KL, SCORES) if name in state.extra}
        ready, outer, kl, extras = self._run(self._advantages, extras, rollout, prepared, scores, jnp.int32(step))
        outer |= collected.sums
        row = 0 if self.text is None else self.text.begin(state.extra[PTX], turn.cursor)
        if turn.poll():
            raise Interrupted
        # From here on the state is given away, and the step runs to its end.
        state, inner, turn.updates = self._updated(state, ready, step, row)
        kept = self._run(self._adapt, extras, kl)
        if self.text is not None:
            kept[PTX] = self.text.after(row, turn.updates, turn.cursor + turn.examples)
        state = dataclasses.replace(state, extra={**state.extra, **kept})
        sums = inner | outer
        return advanced(state), sums if window is None else self._merge(window, sums)

    def _updated(self, state: State, ready: Mapping[str, Array], step: int, row: int) -> tuple[State, Sums, int]:
        """Goes through the completions in a fresh order each epoch, and stops where the policy has moved enough.

        Args:
          state: the state, which is given away.
          ready: what updates read of the completions.
          step: the step of the loop.
          row: the row of text that the first update begins with, where there is text.

        Returns the new state, the sums of its updates, and their number.
        """
        total: Sums | None = None
        made, limit = 0, self.algorithm.target_kl
        for epoch in range(self.algorithm.epochs):
            for part in self._run(self._cut, dict(ready), jnp.int32(step), jnp.int32(epoch)):
                if self.text is not None:
                    part[PTX] = self.text.batch(row, made)
                if limit is None:
                    state, total = self.parts.update(state, part, total)
                    made += 1
                    continue
                state, sums = self.parts.update(state, part)
                total, made = sums if total is None else self._merge(total, sums), made + 1
                if float(sums["moved_kl"].value()) > limit:
                    return state, total, made
        assert total is not None
        return state, total, made

    def programs(self, state: PyTree, batch: PyTree) -> list[Program]:
        """Returns all jitted pieces of a step, with the number of times that it runs them."""
        algorithm, collector = self.algorithm, self.collector
        size = len(batch["id"]) * algorithm.completions
        mesh = self.parts.mesh
        rollout = abstract_placed(abstract_rollout(size, collector.width, collector.longest), mesh)
        prepared = jax.eval_shape(self._prepare, state.params, state.frozen, rollout)
        extras = {name: state.extra[name] for name in (KL, SCORES) if name in state.extra}
        number = jax.ShapeDtypeStruct((), np.int32)
        scores = abstract_placed(abstract_scores(size, collector.names), mesh)
        learnt = (extras, rollout, prepared, scores, number)
        ready = jax.eval_shape(self._advantages, *learnt)[0]
        part = jax.eval_shape(self._cut, ready, number, number)[0]
        if self.text is not None:
            part[PTX] = abstract_placed(self.text.abstract(), mesh)
        (update,) = self.parts.update.programs(state, part)
        times = algorithm.epochs * algorithm.minibatches
        return [
            *collector.programs(join(state.params, state.frozen), size),
            Program("policy_prepare", self._prepare, (state.params, state.frozen, rollout)),
            Program("policy_advantages", self._advantages, learnt),
            Program("policy_cut", self._cut, (ready, number, number), algorithm.epochs),
            dataclasses.replace(update, times=times),
        ]

    def _run(self, program: Any, *given: Any) -> Any:
        found = program(*given)
        return jax.block_until_ready(found) if serialise_dispatch(self.parts.mesh) else found

    def _prepared(self, params: Params, frozen: Params, rollout: dict[str, Array]) -> dict[str, Array]:
        """Returns log-probabilities of policy and reference, and values: by as many rows at a time as an update has."""
        held = cast(join(params, frozen), self._dtype)
        algorithm, model, temperature = self.algorithm, self.model, self.collector.temperature

        def one(batch: dict[str, Array]) -> dict[str, Array]:
            found = {"old": model.scores(held, batch, temperature, model.hidden(held, batch)).logprobs}
            if model.has_reference:
                found["reference"] = model.reference_logprobs(held, batch, temperature)
            if algorithm.has_values:
                found["values"] = model.values(held, batch, beyond=1)
            return found

        count = algorithm.minibatches
        if count == 1:
            return one(rollout)
        parts = jax.lax.map(one, microbatches(rollout, count, 1))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)

    def _learnt(
        self,
        extras: dict[str, dict[str, Array]],
        rollout: dict[str, Array],
        prepared: dict[str, Array],
        given: dict[str, Array],
        step: Array,
    ) -> tuple[dict[str, Array], Sums, Float[Array, ""], dict[str, dict[str, Array]]]:
        """Returns what updates read, metrics, the KL of a completion, and the extras with these scores counted in."""
        algorithm, kept = self.algorithm, given["kept"]
        mask, coefficient = rollout["mask"] * kept[:, None], extras[KL]["coefficient"]
        scores = given["score"]
        sums: Sums = {"reward": Sum.of(scores, kept)}
        if algorithm.score_scale == "running":
            scores, extras = _scaled(scores, kept, extras)
        if algorithm.score_clip is not None:
            scores = jnp.clip(scores, -algorithm.score_clip, algorithm.score_clip)
        inside = lambda x: jnp.where(mask > 0, x, 0.0)  # what lies at padding may be anything
        old, reference, sampled = inside(prepared["old"]), prepared.get("reference"), inside(rollout["sampled"])
        lengths = rollout["end"] - rollout["length"]
        ended = rollout["ended"]
        asked = Rollout(mask, old, reference, prepared.get("values"), scores, kept, ended, lengths, coefficient)
        learnt = algorithm.learnt(asked)
        weight = importance(algorithm, old, sampled)
        rows = lambda value: jnp.broadcast_to(jnp.float32(value), kept.shape)
        ready = {name: rollout[name] for name in ("id", "tokens", "length", "end", "completion")}
        ready |= {"mask": mask, "old": old, **learnt.batch, "coefficient": rows(coefficient)}
        ready["advantages"] = learnt.batch["advantages"] * weight
        ready["policy_on"] = rows(jnp.where(step >= algorithm.values_first, 1.0, 0.0))
        kl = jnp.zeros((), jnp.float32)
        if reference is not None:
            if algorithm.penalises and algorithm.kl.in_ == "loss":
                ready["reference"] = inside(reference)
            each = kl_estimate(old, reference, "k1", mask)
            whole = jnp.sum(each, axis=1)
            kl = jnp.sum(whole * kept) / jnp.maximum(jnp.sum(kept), 1.0)
            sums |= {"kl": Sum.of(whole, kept), "kl_token": Sum.of(each, mask)}
            sums["kl_token_k3"] = Sum.of(kl_estimate(old, reference, "k3", mask), mask)
        sums |= {f"reward/{name}": Sum.of(given[f"each/{name}"], kept) for name in self.collector.names}
        apart = jnp.max(jnp.abs(old - sampled))
        sums |= {
            "length": Sum.of(lengths.astype(jnp.float32)),
            "eos_rate": Sum.of(ended),
            "dropped": Sum.of(1 - kept),
            "ratio0": Max(apart),
            "kl_coefficient": Sum.of(coefficient),
        }
        return ready, {**sums, **learnt.sums}, kl, extras

    def _minibatches(self, ready: dict[str, Array], step: Array, epoch: Array) -> list[dict[str, Array]]:
        """Returns the completions in a fresh order, divided into the minibatches of an epoch."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.collector.seed), ORDER), step)
        order = jax.random.permutation(jax.random.fold_in(key, epoch), ready["id"].shape[0])
        parts = order.reshape(self.algorithm.minibatches, -1)
        return [{name: x[part] for name, x in ready.items()} for part in parts]

    def _adapted(self, extras: dict[str, dict[str, Array]], kl: Array) -> dict[str, dict[str, Array]]:
        size = self.collector.completions
        return {**extras, KL: {"coefficient": adapted(extras[KL]["coefficient"], kl, size, self.algorithm.kl)}}


def _scaled(
    scores: Float[Array, " batch"], kept: Float[Array, " batch"], extras: dict[str, dict[str, Array]]
) -> tuple[Float[Array, " batch"], dict[str, dict[str, Array]]]:
    """Returns scores in units of the deviation of all scores so far, and the extras with these counted in."""
    before = extras[SCORES]
    more = jnp.sum(kept)
    count = before["count"] + more
    away = jnp.sum(jnp.where(kept > 0, scores - before["mean"], 0.0))
    mean = before["mean"] + away / jnp.maximum(count, 1.0)
    squares = before["squares"] + jnp.sum(jnp.where(kept > 0, (scores - before["mean"]) * (scores - mean), 0.0))
    deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1.0))
    scaled = (scores - mean) / jnp.where(deviation > 0, deviation, 1.0)
    return scaled, {**extras, SCORES: {"count": count, "mean": mean, "squares": squares}}
