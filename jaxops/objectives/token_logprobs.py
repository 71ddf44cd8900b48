"""Logprobs of given tokens from hidden states, without an array of [batch, length, vocabulary].

Logits exist for one chunk of tokens at a time, in the forward pass and again in the backward pass. Each device cuts
its own tokens into chunks, inside a `shard_map` over the axes that divide tokens. So no chunk moves between devices,
and the gradient of the head is summed over devices once, after the loop. The vocabulary may be sharded over `tensor`,
which stays XLA's to partition. (A plain scan gathers the head in every iteration; its gradients were wrong on data x
fsdp x tensor. A head that is constrained before the scan is reduced in every iteration.)

The gradient is written out instead of derived, because a derived one accumulates the head's gradient over chunks in
the head's dtype, which loses bits in bfloat16. Tested in tests/objectives/test_token_logprobs.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxops.core.mesh import BATCH_AXES
from jaxops.core.sharding import constrain
from jaxops.core.sums import wide_dtype

LOGITS_AT_ONCE = 2**26
"""The number of logits that a device holds at a time, unless the caller sets a chunk: 256 MiB in float32."""

_NEVER = -1e30
"""The logit of a padding row: its probability is zero, and a product with it is finite."""


class TokenScores(NamedTuple):
    """The scores of given tokens under a model, for each position, float32 (of float64: that).

    Attributes:
      logprobs: log-probability of the target; NaN for a target outside the vocabulary.
      entropy: entropy of the distribution over the vocabulary, in nats.
      logsumexp: log of the sum of the exponentials of the logits (what a z-loss squares).
      mean_logprob: mean of the log-probabilities over the vocabulary (what label smoothing raises).
      best: the most probable token, the lowest of equal ones; no gradient flows through it.
    """

    logprobs: Float[Array, "batch length"]
    entropy: Float[Array, "batch length"]
    logsumexp: Float[Array, "batch length"]
    mean_logprob: Float[Array, "batch length"]
    best: Int[Array, "batch length"]


def token_logprobs(
    hidden: Float[Array, "batch length dim"],
    head: Float[Array, "dim rows"],
    targets: Int[Array, "batch length"],
    *,
    real_vocab: int,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> TokenScores:
    """Returns logprobs of `targets`, entropies and log-sums for each position, exact in value and gradient.

    Logits are products of `hidden` and `head` in float32 (float64 where both are that), then capped, then divided by
    the temperature.

    Args:
      hidden: the last hidden states.
      head: the output kernel; tokens are its first `real_vocab` columns, and the others are padding.
      targets: the token at each position. One outside the vocabulary is NaN, so its weight must be zero.
      real_vocab: number of tokens.
      soft_cap: bounds logits to (-cap, cap) by cap * tanh(x / cap); None does not.
      temperature: divides the logits.
      chunk: number of tokens of a device whose logits exist at a time; None takes as many as `LOGITS_AT_ONCE` allows.

    Raises:
      ValueError: `real_vocab` is not in the head; a cap, temperature or chunk is not positive.

    Example:
      scores = token_logprobs(hidden, model.head(params), batch["targets"], real_vocab=model.real_vocab)
      loss = jaxops.Sum.of(-scores.logprobs, batch["mask"])
    """
    if not 0 < real_vocab <= head.shape[1]:
        raise ValueError(f"token_logprobs: real_vocab is {real_vocab}, but the head has {head.shape[1]} columns")
    if temperature <= 0 or (soft_cap is not None and soft_cap <= 0) or (chunk is not None and chunk < 1):
        raise ValueError(
            "token_logprobs: temperature, soft_cap and chunk must be positive:"
            f" temperature={temperature}, soft_cap={soft_cap}, chunk={chunk}"
        )
    if hidden.dtype != head.dtype:  # a head that is kept in float32 keeps its precision
        hidden, head = hidden.astype(jnp.float32), head.astype(jnp.float32)
    form = _Form(real_vocab, soft_cap, temperature, chunk)

    def scores(hidden: Array, head: Array, targets: Array) -> TokenScores:
        return _scores(form, hidden, constrain(head, ("embed", "vocab")), targets)

    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        scores = jax.sharding.auto_axes(scores, out_sharding=P(*_token_axes(targets.shape)))
    return scores(hidden, head, targets)


@dataclasses.dataclass(frozen=True)
class _Form:
    """How logits are made of hidden states and the head, and how many at a time; see `token_logprobs`."""

    real_vocab: int
    soft_cap: float | None
    temperature: float
    chunk: int | None

    def logits(self, x: Array, head: Array) -> tuple[Array, Array | float]:
        """Returns the logits [tokens, rows] of a chunk, and their derivative with respect to the products."""
        raw = jnp.einsum("nd,dv->nv", x, head, preferred_element_type=wide_dtype(head.dtype))
        slope: Array | float = 1 / self.temperature
        if self.soft_cap is not None:
            bent = jnp.tanh(raw / self.soft_cap)
            raw, slope = self.soft_cap * bent, (1 - bent * bent) / self.temperature
        return self.real(raw / self.temperature, _NEVER), slope

    def real(self, x: Array, other: float) -> Array:
        """Replaces the columns of padding by `other`."""
        if self.real_vocab == x.shape[1]:
            return x
        return jnp.where((jnp.arange(x.shape[1]) < self.real_vocab)[None], x, other)


def _token_axes(shape: tuple[int, ...]) -> tuple[tuple[str, ...], str | None]:
    """Returns the mesh axes above one that divide the batch, and the one that divides the length, of tokens [B, T].

    There are none without a mesh, inside a `shard_map` (each device has its own tokens already), and for an odd batch,
    which XLA then partitions as it likes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return (), None
    axes, ways = [], 1
    for axis in BATCH_AXES:
        if mesh.shape.get(axis, 1) > 1:
            axes.append(axis)
            ways *= mesh.shape[axis]
    along = mesh.shape.get("sequence", 1)
    return tuple(axes) if shape[0] % ways == 0 else (), "sequence" if along > 1 and shape[1] % along == 0 else None


def _on_own_tokens(
    run: Callable[..., Any], shape: tuple[int, ...], in_specs: str, out_specs: Any
) -> Callable[..., Any]:
    """Returns `run` as it runs on each device's own tokens; "t" marks an argument or result of [batch, length, ...].

    Args:
      run: is called with the axes that tokens are divided by, and the arguments.
      shape: the global batch and length.
      in_specs: a letter for each argument, "t" for tokens, "h" for what every device holds whole.
      out_specs: a tree of such letters, like the result.
    """
    batch, length = _token_axes(shape)
    axes = (*batch, *([length] if length else []))
    if not axes:
        return functools.partial(run, ())
    specs = {"t": P(batch, length), "h": P()}
    return jax.shard_map(
        functools.partial(run, axes),
        in_specs=tuple(specs[letter] for letter in in_specs),
        out_specs=jax.tree.map(specs.get, out_specs),
        axis_names=set(axes),
        check_vma=False,
    )


def _chunks(form: _Form, tokens: int, rows: int) -> tuple[int, int]:
    """Returns the number of chunks, and the tokens in each, as even as can be."""
    sharded = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    most = form.chunk or max(1, LOGITS_AT_ONCE * (sharded if rows % sharded == 0 else 1) // rows)
    count = max(1, -(-tokens // most))
    return count, -(-tokens // count)


def _cut(x: Array, count: int, size: int) -> Array:
    """Reshapes [batch, length, ...] to [count, size, ...], with zeros at the end."""
    x = x.reshape(-1, *x.shape[2:])
    return jnp.pad(x, ((0, count * size - x.shape[0]), *((0, 0),) * (x.ndim - 1))).reshape(count, size, *x.shape[1:])


def _joined(x: Array, shape: tuple[int, ...]) -> Array:
    """Undoes `_cut`."""
    x = x.reshape(-1, *x.shape[2:])
    return x[: shape[0] * shape[1]].reshape(*shape, *x.shape[1:])


def _local_scores(form: _Form, axes: tuple[str, ...], hidden: Array, head: Array, targets: Array) -> TokenScores:
    """Returns the scores of one device's tokens."""
    del axes
    shape, column = targets.shape, jnp.arange(head.shape[1])[None]
    count, size = _chunks(form, targets.size, head.shape[1])

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, TokenScores]:
        x, target = part
        logits = form.logits(x, head)[0]
        most = jnp.max(logits, axis=-1)
        below = logits - most[:, None]
        weights = jnp.exp(below)
        whole = jnp.sum(weights, axis=-1)
        lse = most + jnp.log(whole)
        entropy = jnp.log(whole) - jnp.sum(weights * below, axis=-1) / whole
        # No gather: on a sharded vocabulary inside a shard_map XLA aborts.
        picked = jnp.sum(jnp.where(column == target[:, None], logits, 0.0), axis=-1)
        picked = jnp.where((target >= 0) & (target < form.real_vocab), picked, jnp.nan)
        best = jnp.min(jnp.where(logits >= most[:, None], column, column.size), axis=-1)
        mean = jnp.sum(form.real(logits, 0.0), axis=-1) / form.real_vocab
        return None, TokenScores(picked - lse, entropy, lse, mean - lse, best)

    parts = _cut(hidden, count, size), _cut(targets, count, size)
    _, scores = jax.lax.scan(one, None, parts)
    return TokenScores(*(_joined(x, shape) for x in scores))


def _local_gradients(
    form: _Form,
    axes: tuple[str, ...],
    hidden: Array,
    head: Array,
    targets: Array,
    scores: TokenScores,
    grads: tuple[Array, ...],
) -> tuple[Array, Array]:
    """Returns the gradients of one device's hidden states, and of the head, float32, summed over devices.

    For logits z with probabilities p, mean m = sum(p z) and n tokens, d/dz_j is 1[j = target] - p_j of the logprob,
    p_j (m - z_j) of the entropy, p_j of the log-sum, and 1 / n - p_j of the mean logprob.
    """
    column, wide = jnp.arange(head.shape[1])[None], wide_dtype(head.dtype)
    count, size = _chunks(form, targets.size, head.shape[1])

    def one(d_head: Array, part: Any) -> tuple[Array, Array]:
        x, target, lse, mean, (of_target, of_entropy, of_lse, of_mean) = part
        logits, slope = form.logits(x, head)
        steady = (of_lse - of_target - of_mean)[:, None] + of_entropy[:, None] * (mean[:, None] - logits)
        hit = jnp.where(column == target[:, None], of_target[:, None], 0.0)
        d_logits = jnp.exp(logits - lse[:, None]) * steady + hit + of_mean[:, None] / form.real_vocab
        d_raw = (form.real(d_logits, 0.0) * slope).astype(head.dtype)
        d_x = jnp.einsum("nv,dv->nd", d_raw, head, preferred_element_type=wide).astype(x.dtype)
        return d_head + jnp.einsum("nd,nv->dv", x, d_raw, preferred_element_type=wide), d_x

    kept = (hidden, targets, scores.logsumexp, scores.logsumexp - scores.entropy, grads)
    parts = jax.tree.map(lambda x: _cut(x, count, size), kept)
    d_head, d_hidden = jax.lax.scan(one, jnp.zeros(head.shape, wide), parts)
    return _joined(d_hidden, targets.shape), jax.lax.psum(d_head, axes) if axes else d_head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(form: _Form, hidden: Array, head: Array, targets: Array) -> TokenScores:
    run = functools.partial(_local_scores, form)
    return _on_own_tokens(run, targets.shape, "tht", TokenScores(*"ttttt"))(hidden, head, targets)


def _scores_kept(form: _Form, hidden: Array, head: Array, targets: Array) -> tuple[TokenScores, Any]:
    scores = _scores(form, hidden, head, targets)
    return scores, (hidden, head, targets, scores)


def _scores_gradients(form: _Form, kept: Any, grads: TokenScores) -> tuple[Array, Array, None]:
    hidden, head, targets, scores = kept
    run = _on_own_tokens(functools.partial(_local_gradients, form), targets.shape, "thttt", ("t", "h"))
    d_hidden, d_head = run(hidden, head, targets, scores, grads[:4])  # `best` has none
    return d_hidden, constrain(d_head, ("embed", "vocab")).astype(head.dtype), None


_scores.defvjp(_scores_kept, _scores_gradients)
