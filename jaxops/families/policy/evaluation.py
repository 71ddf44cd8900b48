"""The evaluation of a policy: answers to the held-out prompts, what rewards say of them, and how far it has moved."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxops.core.evaluation import on_batches
from jaxops.core.failures import RunFailed
from jaxops.core.interrupt import Interrupted
from jaxops.core.mesh import batch_shards, serialise_dispatch
from jaxops.core.state import Params
from jaxops.core.sums import Sum, Sums, finalize
from jaxops.data.prompts.source import Prompts
from jaxops.objectives.policy import kl_estimate
from jaxops.rl.collect import Collector, Completed
from jaxops.rl.rewards.scoring import Scoring
from jaxops.rl.rollout import placed, rollout_of
from jaxops.rl.sampled import Prompt, Sampled
from jaxops.run.task import Evaluate, Measured, Poll, Task
from jaxops.run.weights import Weights

WinRate = Callable[[Sequence[Any], Sequence[str], Sequence[str]], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class PolicyEvaluation:
    """The evaluation on held-out prompts, always the same ones with the same noise.

    Attributes:
      prompts: the held-out prompts.
      scoring: builds, on a mesh, what scores their answers.
      collector: builds, on a mesh, what samples answers and has them scored.
      judge: compares answers with those of the reference.
    """

    prompts: Prompts
    scoring: Callable[[Mesh, Prompts], Scoring]
    collector: Callable[[Mesh, Scoring], Collector]
    judge: WinRate | None = None
    parts: tuple[str, ...] = ("valid",)

    def on(self, task: Task, mesh: Mesh) -> Evaluate:
        """Returns the evaluation on this mesh. It is compiled once, at the first call."""
        measured = _Measurement(task, self, self.collector(mesh, self.scoring(mesh, self.prompts)), mesh)

        def evaluate(weights: Weights, part: str, step: int, poll: Poll) -> Measured:
            del part
            return measured(weights.params, step, poll)

        return evaluate


class _Measurement:
    def __init__(self, task: Task, evaluation: PolicyEvaluation, collector: Collector, mesh: Mesh):
        self._config, self._model, self._mesh = task.config, collector.model, mesh
        self._given, self._collector = evaluation, collector
        shown = min(task.config.evaluate.prompts, evaluation.prompts.examples)
        self._asked = [Prompt(evaluation.prompts.ids_of(at), at) for at in range(shown)]
        # Rows are added until the mesh divides them; what is said of those is not counted.
        self._rows = -(-shown // batch_shards(mesh)) * batch_shards(mesh)
        self._compare = self._program(task)
        self._references: Sampled | None = None

    def __call__(self, params: Params, step: int, poll: Poll) -> Measured:
        """Returns metrics and samples of these parameters.

        Raises:
          Interrupted: `poll` returned true.
          RunFailed: no answer has a score.
        """
        if poll():
            raise Interrupted
        sampled, rollout = self._answers(self._collector.handoff(params), poll)
        scored = self._collector.score(Completed(self._prompts, sampled, rollout, params, step), None, poll)
        real = np.arange(self._rows) < len(self._asked)
        kept = (scored.kept & real).astype(np.float32)
        if not kept.any():
            raise RunFailed(f"evaluation at step {step}: no answer has a score")
        sums: Sums = {"reward": _mean(scored.total, kept)}
        sums |= {f"reward/{name}": _mean(values, kept) for name, values in scored.each.items()}
        sums |= scored.measured(real)
        sums |= {
            "length": _mean(sampled.lengths, real),
            "eos_rate": _mean(rollout["ended"], real),
            "distinct_2": Sum(*map(jnp.float32, _distinct(sampled, len(self._asked)))),
        }
        arrays = placed({**rollout, "real": real.astype(np.float32)}, self._mesh)
        found = self._compare(params, None, arrays)
        sums |= jax.block_until_ready(found) if serialise_dispatch(self._mesh) else found
        values = finalize(sums)
        references = self._reference_answers(params, poll) if self._given.judge or self._shows_references else None
        if self._given.judge is not None and references is not None:
            values["win_rate"] = self._win_rate(sampled, references)
        wanted = self._config.evaluate.metrics
        chosen = {name: values[name] for name in wanted if name in values}
        return Measured(chosen, samples=self._samples(sampled, references, scored))

    @property
    def _shows_references(self) -> bool:
        return self._config.evaluate.samples > 0 and self._model.has_reference

    @functools.cached_property
    def _prompts(self) -> list[Prompt]:
        more = range(1, self._rows - len(self._asked) + 1)
        return [*self._asked, *(dataclasses.replace(self._asked[0], copy=copy) for copy in more)]

    def _answers(self, writing: Params, poll: Poll) -> tuple[Sampled, dict[str, np.ndarray]]:
        collector = self._collector
        # One step for all evaluations: their noise is the same, so that answers differ by what was learnt.
        sampled = collector.sampler(writing, self._prompts, seed=collector.seed, step=2**31 - 1, poll=poll)
        return sampled, rollout_of(self._prompts, sampled, collector.width, collector.longest)

    def _reference_answers(self, params: Params, poll: Poll) -> Sampled | None:
        """Returns the reference's answers to the same prompts with the same noise; they never change."""
        if self._references is None and self._model.has_reference:
            writing = self._collector.sampler.handoff(self._model.reference(params))
            self._references = self._answers(writing, poll)[0]
        return self._references

    def _win_rate(self, sampled: Sampled, references: Sampled) -> float:
        """Returns how often the judge finds the policy's answer better; every process asks and hears the same."""
        assert self._given.judge is not None and sampled.texts is not None and references.texts is not None
        count = len(self._asked)
        prompts = [self._given.prompts.text(prompt.example) for prompt in self._asked]
        said = list(self._given.judge(prompts, list(sampled.texts[:count]), list(references.texts[:count])))
        if len(said) != count or not all(0 <= float(one) <= 1 for one in said):
            raise RunFailed(f"evaluate.judge: expected {count} numbers from 0 to 1, got {str(said)[:200]}")
        return float(np.mean([float(one) for one in said]))

    def _samples(self, sampled: Sampled, references: Sampled | None, scored: Any) -> list[dict[str, Any]]:
        assert sampled.texts is not None
        found = []
        for row in range(min(self._config.evaluate.samples, len(self._asked))):
            sample: dict[str, Any] = {
                "prompt": self._given.prompts.text(self._asked[row].example),
                "completion": sampled.texts[row],
                "reward": float(scored.total[row]),
                "stopped": sampled.stopped[row],
            }
            if references is not None and references.texts is not None:
                sample["reference"] = references.texts[row]
            found.append(sample)
        return found

    def _program(self, task: Task) -> Any:
        """Returns (params, None, rows) -> KL and entropy of the answers, at the temperature that is learnt at."""
        model, config = self._model, task.config
        temperature, dtype = config.sample.temperature, jnp.dtype(config.precision.compute)

        def compare(params: Params, batch: Mapping[str, Any]) -> Sums:
            mask = batch["mask"] * batch["real"][:, None]
            scores = model.scores(params, batch, temperature, model.hidden(params, batch))
            sums: Sums = {"entropy": Sum.of(scores.entropy, mask)}
            if model.has_reference:
                reference = model.reference_logprobs(params, batch, temperature)
                each = kl_estimate(scores.logprobs, reference, "k1", mask)
                sums["kl"] = Sum.of(jnp.sum(each, axis=1), batch["real"])
                sums["kl_token"] = Sum.of(each, mask)
            return sums

        return jax.jit(on_batches(compare, self._mesh, P(), dtype, task.logical))


def _mean(values: Any, weight: Any) -> Sum:
    return Sum.of(jnp.asarray(np.asarray(values, np.float32)), jnp.asarray(np.asarray(weight, np.float32)))


def _distinct(sampled: Sampled, count: int) -> tuple[int, int]:
    """Returns the number of distinct pairs of neighbouring tokens in all answers, and the number of all pairs."""
    pairs = [
        pair for row in range(count) for pair in zip(*(sampled.completion(row)[at:] for at in (0, 1)), strict=False)
    ]
    return len(set(pairs)), len(pairs)
