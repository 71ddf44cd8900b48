"""Rollouts: prompts and the completions that were sampled for them, as the batch that updates read."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxops.core.mesh import batch_sharding
from jaxops.core.rows import gather_rows, global_arrays, local_rows, owned
from jaxops.rl.sampled import Prompt, Sampled

Host = dict[str, np.ndarray]


def prompts_of(batch: Mapping[str, Any], mesh: Mesh) -> list[Prompt]:
    """Returns the prompts of a batch ("id", "tokens", "length"), all of them on every process."""
    wanted = {name: batch[name] for name in ("id", "tokens", "length")}
    size = len(wanted["id"])
    if jax.process_count() == 1:
        rows = {name: np.asarray(x) for name, x in wanted.items()}
    else:
        rows = gather_rows(mesh, size, owned(mesh, wanted), "gathering prompts")
    each = zip(rows["id"], rows["tokens"], rows["length"], strict=True)
    return [Prompt(tokens[:length].tolist(), int(example)) for example, tokens, length in each]


def rollout_of(prompts: Sequence[Prompt], sampled: Sampled, width: int, longest: int) -> Host:
    """Returns the rows of prompts and completions, with the log-probabilities that tokens were sampled with.

    Args:
      prompts: the prompts, one for each completion.
      sampled: the completions.
      width: number of tokens that prompts have room for.
      longest: number of tokens that completions have room for.
    """
    size = len(prompts)
    tokens = np.zeros((size, width + longest), np.int32)
    completion, logprobs = np.zeros((size, longest), np.int32), np.zeros((size, longest), np.float32)
    length, counts = np.array([len(prompt.ids) for prompt in prompts], np.int32), sampled.lengths.astype(np.int32)
    for row, prompt in enumerate(prompts):
        begin, count = length[row], counts[row]
        tokens[row, :begin] = prompt.ids
        tokens[row, begin : begin + count] = completion[row, :count] = sampled.tokens[row, :count]
        logprobs[row, :count] = sampled.logprobs[row, :count]
    return {
        "id": np.array([prompt.example for prompt in prompts], np.int32),
        "tokens": tokens,
        "length": length,
        "end": length + counts,
        "completion": completion,
        "mask": (np.arange(longest)[None] < counts[:, None]).astype(np.float32),
        "sampled": logprobs,
        "ended": np.array([why != "length" for why in sampled.stopped], bool),
    }


def placed(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Places rows that every process has whole on the mesh, sharded as a batch is."""
    size = len(next(iter(batch.values())))
    if (ranges := local_rows(mesh, size)) is None:
        return {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
    mine = {name: np.concatenate([x[start:stop] for start, stop in ranges]) for name, x in batch.items()}
    return dict(global_arrays(mesh, size)(mine))


def abstract_rollout(size: int, width: int, longest: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a rollout of `size` completions."""
    rows = lambda dtype, *more: jax.ShapeDtypeStruct((size, *more), dtype)
    return {
        "id": rows(np.int32),
        "tokens": rows(np.int32, width + longest),
        "length": rows(np.int32),
        "end": rows(np.int32),
        "completion": rows(np.int32, longest),
        "mask": rows(np.float32, longest),
        "sampled": rows(np.float32, longest),
        "ended": rows(np.bool_),
    }
