"""One score from several rewards: heads of an ensemble, penalties on the length, and the weighted sum."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxops.core.sums import Sum, Sums
from jaxops.rl.rewards.config import FunctionReward, LengthPenalty, MissingEos, Overlong, Reward, RunReward
from jaxops.rl.rewards.host import FunctionScores


class Reduced(NamedTuple):
    """The score of each text, and the deviation of the heads' scores (0 for a single head)."""

    score: Float[Array, " batch"]
    disagreement: Float[Array, " batch"]


class Combined(NamedTuple):
    """The score of each completion, and its weight (0 where it is dropped)."""

    score: Float[Array, " batch"]
    weight: Float[Array, " batch"]


def reduced(scores: Float[Array, "batch heads"], config: RunReward) -> Reduced:
    """Returns one score a text from those of the heads of a reward model, as `config.reduce` says.

    The deviation is that of a sample: squares are divided by the number of heads - 1.
    """
    heads = scores.shape[1]
    mean = jnp.mean(scores, axis=1)
    spread = jnp.std(scores, axis=1, ddof=1) if heads > 1 else jnp.zeros_like(mean)
    if config.reduce == "min":
        return Reduced(jnp.min(scores, axis=1), spread)
    return Reduced(mean - config.k * spread if config.reduce == "mean_minus_std" else mean, spread)


def shaped(
    rewards: Sequence[Reward], length: Int[Array, " batch"], cut: Bool[Array, " batch"]
) -> dict[str, Float[Array, " batch"]]:
    """Returns the rewards that length and end of a completion alone decide, by name; they are zero or penalties.

    Args:
      rewards: all rewards, of which these kinds are used.
      length: the number of tokens of each completion, the one that ended it included.
      cut: whether a completion was cut at the largest number of tokens.
    """
    tokens, found = length.astype(jnp.float32), dict[str, Array]()
    for reward in rewards:
        if isinstance(reward, MissingEos):
            found[reward.label] = jnp.where(cut, -reward.penalty, 0.0).astype(jnp.float32)
        elif isinstance(reward, LengthPenalty):
            found[reward.label] = -reward.per_token * tokens
        elif isinstance(reward, Overlong):
            beyond = (tokens - (reward.longest - reward.buffer)) / reward.buffer
            found[reward.label] = -reward.penalty * jnp.clip(beyond, 0.0, 1.0)
    return found


class HostScores(NamedTuple):
    """The answers of functions as arrays: by name, 0 where a sample is dropped, and the weights of the samples.

    Further metrics are by `NAME/METRIC`, and NaN where a function had none.
    """

    scores: dict[str, Float[np.ndarray, " batch"]]
    weight: Float[np.ndarray, " batch"]
    sums: Sums
    metrics: dict[str, Float[np.ndarray, " batch"]]


def host_scores(
    scored: Sequence[FunctionScores], names: Sequence[str], further: Mapping[str, Sequence[str]] | None = None
) -> HostScores:
    """Returns the answers of functions as float32 arrays, and how often each had none.

    A sample that any function drops has the weight 0. The sums are shares of all samples: `reward_errors/NAME`,
    `reward_timeouts/NAME` and `reward_dropped/NAME`.

    Args:
      scored: what the functions said of each sample.
      names: the names of the functions.
      further: the names of the further metrics of each function.
    """
    answers = {name: [one.scores[name] for one in scored] for name in names}
    kept = np.ones(len(scored), bool)
    for given in answers.values():
        kept &= np.array([answer is not None for answer in given], bool)
    scores = {
        name: np.array([0.0 if answer is None else answer for answer in given], np.float32)
        for name, given in answers.items()
    }
    sums: Sums = {}
    for name in names:
        faults = [one.faults.get(name) for one in scored]
        sums[f"reward_errors/{name}"] = _share(faults.count("error"), len(scored))
        sums[f"reward_timeouts/{name}"] = _share(faults.count("timeout"), len(scored))
        sums[f"reward_dropped/{name}"] = _share(answers[name].count(None), len(scored))
    number = lambda value: np.nan if value is None else value
    metrics = {
        f"{name}/{metric}": np.array([number(one.metrics.get(name, {}).get(metric)) for one in scored], np.float32)
        for name, known in (further or {}).items()
        for metric in known
    }
    return HostScores(scores, kept.astype(np.float32), sums, metrics)


def _share(part: int, whole: int) -> Sum:
    return Sum(jnp.asarray(part, jnp.float32), jnp.asarray(whole, jnp.float32))


def combined(
    scores: Mapping[str, Float[Array, " batch"]],
    rewards: Sequence[Reward],
    weight: Float[Array, " batch"] | None = None,
) -> Combined:
    """Returns the weighted sum of the rewards, each within its own bounds.

    A completion of weight 0 has the score 0; a score of another that is not finite stays as it is, so that it is seen.

    Args:
      scores: the scores of each reward by its name.
      rewards: the rewards.
      weight: 0 for completions that are dropped; None keeps all.

    Raises:
      ValueError: the scores are not those of the rewards.
    """
    if scores.keys() != (labels := {reward.label for reward in rewards}):
        raise ValueError(f"scores of {sorted(scores)}, but the rewards are {sorted(labels)}")
    size = next(iter(scores.values())).shape[0]
    kept = jnp.ones(size, jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)
    total = jnp.zeros(size, jnp.float32)
    for reward in rewards:
        score = jnp.asarray(scores[reward.label], jnp.float32)
        if isinstance(reward, FunctionReward | RunReward):
            if reward.clip is not None:
                score = jnp.clip(score, -reward.clip, reward.clip)
            score = reward.weight * score
        total = total + score
    return Combined(jnp.where(kept > 0, total, 0.0), kept)
