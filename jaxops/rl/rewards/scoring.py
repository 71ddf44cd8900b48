"""Scores completions by all rewards of a run: functions on the host, reward models on the mesh, and penalties."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxops.core.answers import Key
from jaxops.core.evaluation import on_batches
from jaxops.core.journal import Journal
from jaxops.core.mesh import batch_axes, batch_shards, serialise_dispatch
from jaxops.core.rows import abstract_placed, gather_rows, owned, owned_rows
from jaxops.core.sharding import Axes
from jaxops.core.state import Params
from jaxops.core.sums import Sum, Sums
from jaxops.core.turn import Program
from jaxops.models.policy import REWARDS
from jaxops.rl.collect import Completed, Scored
from jaxops.rl.rewards.combine import HostScores, combined, host_scores, reduced, shaped
from jaxops.rl.rewards.config import FunctionReward, Reward, RunReward, further_metrics
from jaxops.rl.rewards.function import Asked
from jaxops.rl.rewards.host import HostRewards, Unkept
from jaxops.rl.rewards.judge import Judge
from jaxops.rl.rollout import placed

AT_ONCE = 64
"""Texts that a device of the mesh scores at a time."""


class PromptTexts(Protocol):
    """Prompts as they were written, by their number."""

    def text(self, example: int) -> Any:
        """Returns a prompt: a text, or messages."""
        ...

    def columns(self, example: int) -> Mapping[str, Any]:
        """Returns the other columns of the prompt's row."""
        ...


class Scoring:
    """Scores completions, as `Collector` asks for it.

    Args:
      rewards: the rewards.
      prompts: the prompts that completions answer.
      columns: names of the columns beside the prompt.
      judges: the reward models, by the names of their rewards.
      mesh: the mesh of the parameters.
      dtype: the dtype that reward models compute in.
      logical: mesh axes of logical names, over the defaults.

    Attributes:
      names: the names of all rewards.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        prompts: PromptTexts,
        columns: Sequence[str],
        judges: Mapping[str, Judge],
        mesh: Mesh,
        *,
        dtype: Any = jnp.float32,
        logical: Mapping[str, Axes] | None = None,
    ) -> None:
        self._rewards, self._prompts, self._columns = tuple(rewards), prompts, tuple(columns)
        self._judges, self._mesh = dict(judges), mesh
        self.names = tuple(reward.label for reward in rewards)
        self._functions = tuple(one.label for one in self._rewards if isinstance(one, FunctionReward))
        self._host: HostRewards | None = None
        self._journal: Journal | None = None
        on_mesh = lambda judge: on_batches(judge.scores, mesh, P(batch_axes(mesh)), dtype, logical)
        self._programs = {name: jax.jit(on_mesh(judge)) for name, judge in self._judges.items()}

    def __call__(self, completed: Completed, journal: Journal | None, poll: Callable[[], bool]) -> Scored:
        """Returns the scores of completions; functions are asked by the process that owns a row, and all learn of it.

        Raises:
          Interrupted: `poll` returned true.
          RunFailed: a function with `on_error: stop` gave no answer.
        """
        size = len(completed.prompts)
        found: dict[str, Any] = {}
        weight, sums, metrics = np.ones(size, np.float32), Sums(), dict[str, np.ndarray]()
        if self._functions:
            host = self._asked(completed, journal, poll)
            found |= host.scores
            weight, sums, metrics = host.weight, host.sums, host.metrics
        lengths = np.asarray(completed.sampled.lengths)
        found |= shaped(self._rewards, jnp.asarray(lengths), jnp.asarray(~completed.rollout["ended"]))
        for reward in self._rewards:
            if isinstance(reward, RunReward):
                heads, cut = self._heads(reward.label, completed)
                score, apart = reduced(jnp.asarray(heads, jnp.float32), reward)
                found[reward.label] = score
                sums[f"disagreement/{reward.label}"] = Sum.of(apart)
                sums[f"reward_cut/{reward.label}"] = Sum.of(jnp.asarray(cut, jnp.float32))
        total = combined(found, self._rewards, jnp.asarray(weight)).score
        each = {name: np.asarray(found[name]) for name in self.names}
        return Scored(np.asarray(total), weight > 0, each, sums, metrics)

    def programs(self, params: Params, completions: int) -> list[Program]:
        """Returns the compiled programs of scoring so many completions: one for each reward model.

        Args:
          params: the parameters of all models, abstract or not.
          completions: the number of completions.
        """
        at_once = _part(completions, batch_shards(self._mesh))
        return [
            Program(
                f"score_{name}",
                self._programs[name],
                (params[REWARDS][name], None, abstract_placed(judge.abstract_rows(at_once), self._mesh)),
                completions // at_once,
            )
            for name, judge in self._judges.items()
        ]

    def _asked(self, completed: Completed, journal: Journal | None, poll: Callable[[], bool]) -> HostScores:
        """Asks the functions about the rows that this process owns, and exchanges the answers."""
        if self._host is None or journal is not self._journal:
            kept = Unkept() if journal is None else journal
            self._host, self._journal = HostRewards(self._rewards, kept, self._columns), journal
        size = len(completed.prompts)
        mine = [row for start, stop in owned_rows(self._mesh, size) for row in range(start, stop)]
        assert completed.sampled.texts is not None
        asked = []
        for row in mine:
            prompt = completed.prompts[row]
            asked.append(
                Asked(
                    Key(completed.step, *prompt.name),
                    self._prompts.text(prompt.example),
                    completed.sampled.texts[row],
                    self._prompts.columns(prompt.example),
                )
            )
        everything = self._host.all(self._mesh, size, self._host.score(asked, poll))
        return host_scores(everything, self._functions, further_metrics(self._rewards))

    def _heads(self, name: str, completed: Completed) -> tuple[np.ndarray, np.ndarray]:
        """Returns the normalised score of each head of a reward model, [rows, heads], on every process.

        The second array tells which answers are longer than what the model reads, [rows].
        """
        judge = self._judges[name]
        assert completed.sampled.texts is not None
        prompts = [self._prompts.text(prompt.example) for prompt in completed.prompts]
        rows, cut = judge.rows(prompts, completed.sampled.texts)
        size, params = len(prompts), completed.params[REWARDS][name]
        at_once = _part(size, batch_shards(self._mesh))
        parts = []
        for start in range(0, size, at_once):
            part = placed({key: x[start : start + at_once] for key, x in rows.items()}, self._mesh)
            scores = self._programs[name](params, None, part)
            if serialise_dispatch(self._mesh):
                jax.block_until_ready(scores)
            mine = np.asarray(scores) if jax.process_count() == 1 else None
            if mine is None:
                mine = gather_rows(self._mesh, at_once, owned(self._mesh, scores), "gathering scores")
            parts.append(mine)
        return judge.normalised(np.concatenate(parts)), cut


def _part(size: int, shards: int) -> int:
    """Returns the largest number of rows that divides `size`, that the shards divide, and that is not too many."""
    wanted = [part for part in range(shards, size + 1, shards) if size % part == 0]
    return max((part for part in wanted if part <= AT_ONCE * shards), default=size)
