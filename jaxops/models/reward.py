"""A reward model: a decoder, and above it heads that read one score at the last token of a text.

The heads' parameters lie beside the decoder's, as `params["reward"]`, so that the decoder keeps its paths: a language
model's weights are loaded as they are. Tested in tests/models/test_reward.py.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxops.core.sharding import Rule, constrain
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.functional import Params

REWARD = "reward"
"""The name of the heads among the parameters."""
VOCABULARY = "head"
"""The name of a decoder's kernel over the vocabulary, which a reward model has none of."""


class RewardModel:
    """Scores of texts: w . h + b of the hidden state h at the last token, for each of the `ensemble` heads.

    The text is prompt and answer together; the last token is the one that ends the answer.

    Attributes:
      decoder: the decoder.
      ensemble: the number of heads.
      rules: sharding rules of the parameters; the heads are whole on every device.
      shapes: shapes and dtypes of the parameters.
      padding: the decoder's.

    Example:
      model = RewardModel(build_decoder(Architecture(vocab=300)), ensemble=4)
      scores = model.scores(model.init(jax.random.key(0)), tokens, segment, position)  # [batch, 4]
    """

    def __init__(self, decoder: Decoder, ensemble: int = 1):
        self.decoder, self.ensemble = decoder, ensemble
        self.padding = {path: what for path, what in decoder.padding.items() if not path.startswith(f"{VOCABULARY}/")}
        self.rules: list[Rule] = [(rf"^{REWARD}/", ()), *decoder.rules]
        self.shapes: PyTree = jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key: Key[Array, ""]) -> Params:
        """Draws a fresh decoder as it does itself, and heads from normal(1 / sqrt(dim + 1)) with biases of zero.

        (Stiennon et al. 2020 draw the head so.)
        """
        params = {name: value for name, value in self.decoder.init(key).items() if name != VOCABULARY}
        dim = self.decoder.config.dim
        kernel = jax.random.normal(jax.random.fold_in(key, 1), (dim, self.ensemble)) * (dim + 1) ** -0.5
        return params | {REWARD: {"kernel": kernel, "bias": jnp.zeros(self.ensemble)}}

    def scores(
        self,
        params: PyTree,
        tokens: Int[Array, "batch length"],
        segment: Int[Array, "batch length"],
        position: Int[Array, "batch length"],
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch heads"]:
        """Returns each head's score of each row, float32; a row without tokens has one that means nothing.

        Args:
          params: the parameters.
          tokens: token ids.
          segment: 1 at tokens and 0 at padding; padding may stand anywhere.
          position: the position of each token in its text.
          keys: a key for each row, for dropout; None turns it off.
        """
        return self.heads(params, self.last_hidden(params, tokens, segment, position, keys))

    def last_hidden(
        self,
        params: PyTree,
        tokens: Int[Array, "batch length"],
        segment: Int[Array, "batch length"],
        position: Int[Array, "batch length"],
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch dim"]:
        """Returns the decoder's hidden state at the last token of each row.

        Args:
          params: the parameters.
          tokens: token ids.
          segment: 1 at tokens and 0 at padding; padding may stand anywhere.
          position: the position of each token in its text.
          keys: a key for each row, for dropout; None turns it off.
        """
        hidden = self.decoder.hidden(params, tokens, segment, position, keys)
        places = jnp.arange(tokens.shape[1])[None]
        last = jnp.max(jnp.where(segment > 0, places, 0), axis=1)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]

    def heads(self, params: PyTree, hidden: Float[Array, "batch dim"]) -> Float[Array, "batch heads"]:
        """Returns each head's score of hidden states at last tokens, float32."""
        kernel = constrain(params[REWARD]["kernel"], ("embed", None))
        product = jnp.matmul(hidden.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
        return product + params[REWARD]["bias"].astype(jnp.float32)[None]

    def score(
        self,
        params: PyTree,
        tokens: Int[Array, "batch length"],
        segment: Int[Array, "batch length"],
        position: Int[Array, "batch length"],
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, " batch"]:
        """Returns the mean score of the heads for each row.

        Args:
          params: the parameters.
          tokens: token ids.
          segment: 1 at tokens and 0 at padding.
          position: the position of each token in its text.
          keys: a key for each row, for dropout; None turns it off.
        """
        return jnp.mean(self.scores(params, tokens, segment, position, keys), axis=1)
