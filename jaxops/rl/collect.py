"""Collecting: completions of a batch of prompts, sampled by the policy as it is, with the score of each."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxops.core.failures import RunFailed
from jaxops.core.journal import Journal
from jaxops.core.mesh import serialise_dispatch
from jaxops.core.sharding import parameter_shardings
from jaxops.core.state import Params
from jaxops.core.sums import Sum, Sums, merge
from jaxops.core.turn import Program, Turn
from jaxops.models.lora import Lora
from jaxops.models.policy import PolicyModel
from jaxops.rl.algorithms import Algorithm
from jaxops.rl.rollout import Host, prompts_of, rollout_of
from jaxops.rl.sample import Sampler
from jaxops.rl.sampled import Prompt, Sampled


class Scored(NamedTuple):
    """The scores of completions, on the host.

    Attributes:
      total: the score that is learnt from; 0 where there is none.
      kept: whether a completion has a score.
      each: what each reward said, by name, before weights; 0 where it said nothing.
      sums: metrics of the scoring itself, always of the same names.
      metrics: further numbers of rewards by `NAME/METRIC`, always of the same names; NaN where there is none.
    """

    total: np.ndarray
    kept: np.ndarray
    each: Mapping[str, np.ndarray]
    sums: Sums = {}
    metrics: Mapping[str, np.ndarray] = {}

    def measured(self, weight: np.ndarray | None = None) -> Sums:
        """Returns the means of the further numbers as `reward/NAME/METRIC`, over completions that have one.

        Args:
          weight: is 0 for completions that are left out.
        """
        found: Sums = {}
        for name, values in self.metrics.items():
            there = ~np.isnan(values) if weight is None else ~np.isnan(values) & (weight > 0)
            kept = jnp.asarray(there, jnp.float32)
            found[f"reward/{name}"] = Sum.of(jnp.asarray(np.where(there, values, 0), jnp.float32), kept)
        return found


@dataclasses.dataclass(frozen=True)
class Completed:
    """Completions that are to be scored.

    Attributes:
      prompts: the prompts, one for each completion, with its name.
      sampled: the completions.
      rollout: prompts and completions as rows, without scores.
      params: the parameters of all models.
      step: the step of the loop.
    """

    prompts: Sequence[Prompt]
    sampled: Sampled
    rollout: Host
    params: Params
    step: int


Score = Callable[[Completed, Journal | None, Callable[[], bool]], Scored]
"""Scores completions: it is called with them, the run's journal, and a function that says when to stop."""


@dataclasses.dataclass(frozen=True)
class Collected:
    """Completions with their scores, the same on every process.

    Attributes:
      rollout: prompts and completions as rows.
      arrays: "score" and "kept" [rows], and "each/NAME" of each reward.
      sums: metrics of the collecting itself.
    """

    rollout: Host
    arrays: Host
    sums: Sums


class Collector:
    """Samples and scores completions of prompts.

    Args:
      model: the models.
      sampler: the sampler, of the decoder under the policy.
      score: scores completions.
      judged: returns the compiled programs of scoring so many completions, for parameters that may be abstract.
      names: names of the rewards that `score` tells apart.
      width: number of tokens that prompts have room for.
      completions: number of completions of a step.
      seed: the seed of the run.
      mesh: the mesh of the parameters.

    Attributes:
      temperature: the temperature of sampling.
      longest: number of tokens that completions have room for.
    """

    def __init__(
        self,
        model: PolicyModel,
        sampler: Sampler,
        score: Score,
        *,
        judged: Callable[[Params, int], list[Program]] = lambda params, completions: [],
        names: Sequence[str] = (),
        width: int,
        completions: int,
        seed: int,
        mesh: Mesh,
    ) -> None:
        self.model, self.sampler, self.score, self._judged = model, sampler, score, judged
        self.names, self.width, self.completions, self.seed, self.mesh = tuple(names), width, completions, seed, mesh
        self.temperature, self.longest = sampler.options.temperature, sampler.options.max_tokens
        shapes = jax.eval_shape(model.written, model.shapes)
        places = parameter_shardings(shapes, model.decoder.rules, mesh)
        merged = jax.sharding.auto_axes(model.written, out_sharding=jax.tree.map(lambda x: x.spec, places))
        self._merged = jax.jit(merged) if isinstance(model.policy, Lora) else model.written

    def handoff(self, params: Params) -> Params:
        """Returns the policy's parameters as the sampler wants them."""
        found: Params = self.sampler.handoff(self._merged(params))
        return jax.block_until_ready(found) if serialise_dispatch(self.mesh) else found

    def collect(
        self,
        params: Params,
        batch: Mapping[str, Any],
        step: int,
        turn: Turn,
        journal: Journal | None,
        algorithm: Algorithm,
    ) -> Collected:
        """Returns completions of a batch of prompts with their scores.

        Where the algorithm draws again, groups of completions with one score give their place to other prompts.

        Args:
          params: the parameters of all models.
          batch: the prompts.
          step: the step of the loop.
          turn: the loop's turn, for stopping and for further prompts.
          journal: answers of the host.
          algorithm: the number of completions of a prompt, and how often prompts are drawn again.

        Raises:
          Interrupted: the run is to stop.
          RunFailed: no completion has a score.
        """
        group, writing = algorithm.completions, self.handoff(params)
        whole = self._once(params, writing, batch, step, 0, group, journal, turn.poll)
        wanted = len(whole.arrays["kept"]) // group
        for redraw in range(1, algorithm.draws + 1):
            differ = ~_flat(whole.arrays, group)
            if differ.sum() >= wanted:
                break
            more = self._once(params, writing, turn.draw(wanted), step, redraw, group, journal, turn.poll)
            whole = _joined(whole, more, group, wanted)
        if not whole.arrays["kept"].any():
            raise RunFailed(f"step {step}: no completion has a score: all {len(whole.arrays['kept'])} were dropped")
        return whole

    def _once(
        self,
        params: Params,
        writing: Params,
        batch: Mapping[str, Any],
        step: int,
        redraw: int,
        group: int,
        journal: Journal | None,
        poll: Callable[[], bool],
    ) -> Collected:
        prompts = _named(prompts_of(batch, self.mesh), group, redraw)
        sampled = self.sampler(writing, prompts, seed=self.seed, step=step, poll=poll)
        rollout = rollout_of(prompts, sampled, self.width, self.longest)
        scored = self.score(Completed(prompts, sampled, rollout, params, step), journal, poll)
        kept = scored.kept.astype(np.float32)
        arrays = {"score": np.where(kept > 0, scored.total, 0.0).astype(np.float32), "kept": kept}
        arrays |= {f"each/{name}": np.asarray(scored.each[name], np.float32) for name in self.names}
        return Collected(rollout, arrays, {**scored.sums, **scored.measured()})

    def programs(self, params: Params, completions: int) -> list[Program]:
        """Returns the compiled programs of sampling and scoring so many completions."""
        written = self.sampler.abstract(jax.eval_shape(self.model.written, params))
        return [
            *self.sampler.programs(written, completions, self.width),
            *self._judged(params, completions),
        ]


def abstract_scores(size: int, names: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of `Collected.arrays`."""
    row = jax.ShapeDtypeStruct((size,), jnp.float32)
    return {"score": row, "kept": row, **{f"each/{name}": row for name in names}}


def _named(prompts: Sequence[Prompt], group: int, redraw: int) -> list[Prompt]:
    """Returns `group` copies of each prompt, numbered on where a batch holds a prompt twice, as small data do."""
    found, seen = [], collections.Counter[int]()
    for one in prompts:
        first = seen[one.example] * group
        seen[one.example] += 1
        found += [dataclasses.replace(one, copy=first + at, redraw=redraw) for at in range(group)]
    return found


def _flat(arrays: Host, group: int) -> np.ndarray:
    """Returns which groups have one score only, or fewer than two."""
    scores, kept = arrays["score"].reshape(-1, group), arrays["kept"].reshape(-1, group) > 0
    largest = np.where(kept, scores, -np.inf).max(axis=1)
    return ~(largest > np.where(kept, scores, np.inf).min(axis=1))


def _joined(whole: Collected, more: Collected, group: int, wanted: int) -> Collected:
    """Returns `wanted` groups of both: those whose scores differ first, in order, then the others."""
    flat = np.concatenate([_flat(whole.arrays, group), _flat(more.arrays, group)])
    chosen = np.argsort(flat, kind="stable")[:wanted]
    rows = (chosen[:, None] * group + np.arange(group)[None]).reshape(-1)
    both = lambda one, other: {name: np.concatenate([x, other[name]])[rows] for name, x in one.items()}
    return Collected(both(whole.rollout, more.rollout), both(whole.arrays, more.arrays), merge(whole.sums, more.sums))
