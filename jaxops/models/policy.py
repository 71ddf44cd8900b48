"""The models of policy optimisation in one tree of parameters: policy, value, reference and reward models.

`policy/` is the decoder that writes, `value/` predicts its rewards, the frozen `reference/` is the decoder that it
began as, and each frozen `rewards/NAME/` judges what it wrote. Where the policy is trained by low-rank adapters, its
base is the reference and there is no second copy. Tested in tests/models/test_policy.py.

A batch has rows of prompt and completion: "tokens" [batch, width], "length" [batch] of the prompt, "end" [batch] of
both, and "completion" [batch, longest], the completion alone. What a method returns for tokens of completions is
[batch, longest]: entry t belongs to token t of the completion, and is read off the state before that token.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jaxops.core.sharding import Rule, constrain, pattern_below, rules_below
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.functional import Params
from jaxops.models.lora import Lora
from jaxops.models.reference import REFERENCE
from jaxops.models.reward import VOCABULARY
from jaxops.objectives.token_logprobs import TokenScores, token_logprobs

Batch = Mapping[str, Any]

POLICY, VALUE, REWARDS = "policy", "value", "rewards"
SCORE = "score"
"""The name of the value's last layer, below `value/`."""

ValueKind = Literal["head", "trunk"]


class PolicyModel:
    """Policy, value, reference and reward models, as one model with `init`, `shapes`, `rules` and `padding`.

    Args:
      policy: the decoder that writes, or its adapters.
      value: `head` reads values off the policy's hidden states (Ziegler et al. 2019), `trunk` has a decoder of its own;
        None is for algorithms without values.
      reference: whether the policy is held against the decoder that it began as.
      judges: reward models by name.
      reference_dtype: the dtype that the reference is stored in. In that of the computation nothing is lost by it.

    Attributes:
      decoder: the decoder under the policy.
      copies_reference: whether the reference has parameters of its own.
      frozen: path patterns of what is not trained.
      dtypes: (path pattern, dtype) of parameters that keep float32 whatever the others have.
      parts: the beginnings of the paths of the models.

    Example:
      model = PolicyModel(decoder, value="head")
      state = jaxops.init_state(model.init, key, tx, mesh, model.rules, frozen=model.frozen, dtypes=model.dtypes)
    """

    def __init__(
        self,
        policy: Decoder | Lora,
        *,
        value: ValueKind | None = None,
        reference: bool = True,
        judges: Mapping[str, Any] | None = None,
        reference_dtype: str = "float32",
    ) -> None:
        self.policy, self.value_kind, self.judges = policy, value, dict(judges or {})
        self.decoder: Decoder = policy.model if isinstance(policy, Lora) else policy
        self.has_reference = reference
        self.copies_reference = reference and not isinstance(policy, Lora)
        parts: dict[str, Any] = {POLICY: policy}
        if value == "trunk":
            parts[VALUE] = self.decoder
        if self.copies_reference:
            parts[REFERENCE] = self.decoder
        parts |= {f"{REWARDS}/{name}": model for name, model in self.judges.items()}
        self.parts = (*(f"{prefix}/" for prefix in parts), *((f"{VALUE}/",) if value == "head" else ()))
        self.rules: list[Rule] = [(rf"^{VALUE}/{SCORE}/", ())]
        self.rules += [rule for prefix, part in parts.items() for rule in rules_below(prefix, part.rules)]
        self.padding: dict[str, str] = {
            f"{prefix}/{path}": what for prefix, part in parts.items() for path, what in part.padding.items()
        }
        self.frozen: tuple[str, ...] = tuple(f"^{name}/" for name in parts if name not in (POLICY, VALUE))
        self.dtypes: list[tuple[str, str]] = [(rf"^{VALUE}/{SCORE}/", "float32")] if value else []
        if self.copies_reference:
            self.dtypes.append((rf"^{REFERENCE}/", reference_dtype))
        if isinstance(policy, Lora):
            self.frozen += tuple(pattern_below(POLICY, pattern) for pattern in policy.frozen)
            self.dtypes += [(pattern_below(POLICY, pattern), dtype) for pattern, dtype in policy.dtypes]
        self.shapes: PyTree = jax.eval_shape(self.init, jax.random.key(0))
        if value == "trunk":
            self.padding.pop(f"{VALUE}/{VOCABULARY}/kernel", None)

    def init(self, key: Key[Array, ""]) -> Params:
        """Draws a fresh policy; its reference is the same, its value has the same trunk, and says 0 of every state."""
        params: Params = {POLICY: self.policy.init(key)}
        base = self.policy.base(params[POLICY]) if isinstance(self.policy, Lora) else params[POLICY]
        if self.copies_reference:
            params[REFERENCE] = base
        if self.value_kind is not None:
            score = {"kernel": jnp.zeros((self.decoder.config.dim, 1)), "bias": jnp.zeros(1)}
            trunk = {name: x for name, x in base.items() if name != VOCABULARY} if self.value_kind == "trunk" else {}
            params[VALUE] = {**trunk, SCORE: score}
        if self.judges:
            params[REWARDS] = {
                name: model.init(jax.random.fold_in(key, at)) for at, (name, model) in enumerate(self.judges.items(), 1)
            }
        return params

    def written(self, params: Params) -> Params:
        """Returns the parameters of the decoder that writes, with adapters merged: for sampling and export."""
        return self.policy.merge(params[POLICY]) if isinstance(self.policy, Lora) else params[POLICY]

    def reference(self, params: Params) -> Params:
        """Returns the parameters of the reference, as a decoder's."""
        return self.policy.base(params[POLICY]) if isinstance(self.policy, Lora) else params[REFERENCE]

    def trained(self, params: Params) -> Params:
        """Returns the parameters of the policy for the methods of its decoder; gradients flow into adapters."""
        held: Params = params[POLICY]
        return self.policy.adapted(held) if isinstance(self.policy, Lora) else held

    def hidden(self, params: Params, batch: Batch) -> Float[Array, "batch longest dim"]:
        """Returns the policy's hidden state before each token of the completions."""
        return self._hidden(self.trained(params), batch)

    def scores(
        self, params: Params, batch: Batch, temperature: float, hidden: Float[Array, "batch longest dim"]
    ) -> TokenScores:
        """Returns log-probability and entropy of each token of the completions under the policy.

        Args:
          params: the parameters of all models.
          batch: rows of prompt and completion.
          temperature: divides the logits, as it did when the completions were sampled.
          hidden: `hidden(params, batch)`.
        """
        return self._scores(self.trained(params), batch, temperature, hidden)

    def reference_logprobs(self, params: Params, batch: Batch, temperature: float) -> Float[Array, "batch longest"]:
        """Returns the log-probability of each token of the completions under the reference.

        Args:
          params: the parameters of all models.
          batch: rows of prompt and completion.
          temperature: divides the logits; it is the policy's.
        """
        held = self.reference(params)
        return self._scores(held, batch, temperature, self._hidden(held, batch)).logprobs

    def values(
        self, params: Params, batch: Batch, hidden: Float[Array, "batch longest dim"] | None = None, beyond: int = 0
    ) -> Float[Array, "batch longest_and_beyond"]:
        """Returns the value of the state before each token of the completions, float32.

        Args:
          params: the parameters of all models.
          batch: rows of prompt and completion.
          hidden: the policy's hidden states, where values are read off those and they are known.
          beyond: the number of further tokens whose values are returned too (1: the state after the longest).
        """
        held = params[VALUE]
        if self.value_kind == "trunk":
            hidden = self._hidden(held, batch, beyond)
        elif hidden is None or beyond:
            hidden = self._hidden(self.trained(params), batch, beyond)
        kernel = constrain(held[SCORE]["kernel"], ("embed", None)).astype(jnp.float32)
        product = jnp.matmul(hidden.astype(jnp.float32), kernel, preferred_element_type=jnp.float32)
        return (product + held[SCORE]["bias"].astype(jnp.float32)[None, None])[..., 0]

    def _hidden(self, params: Params, batch: Batch, beyond: int = 0) -> Float[Array, "batch longest dim"]:
        tokens = batch["tokens"]
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        segment = (position < batch["end"][:, None]).astype(jnp.int32)
        hidden = self.decoder.hidden(params, tokens, segment, position)
        # Only states before tokens of completions go on: the head over the vocabulary never sees the prompts.
        places = batch["length"][:, None] - 1 + jnp.arange(batch["completion"].shape[1] + beyond, dtype=jnp.int32)[None]
        places = jnp.minimum(places, tokens.shape[1] - 1)
        return jnp.take_along_axis(hidden, places[..., None], axis=1)

    def _scores(
        self, params: Params, batch: Batch, temperature: float, hidden: Float[Array, "batch longest dim"]
    ) -> TokenScores:
        return token_logprobs(
            hidden,
            self.decoder.head(params),
            batch["completion"],
            real_vocab=self.decoder.real_vocab,
            soft_cap=self.decoder.soft_cap,
            temperature=temperature,
        )
