"""The architecture of a decoder: one dataclass whose choices cover the published families of language models.

Llama 2 and 3, SmolLM, Mistral, Qwen 2, 2.5 and 3, Gemma 2 and 3 and GPT-2 are values of it. `huggingface.py` reads and
writes it as a `config.json`. Tested in tests/models/test_decoder.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from jaxops.config.part import Part

LayerKind = Literal["full", "window"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings (Su et al. 2021) and the scalings that stretch them to longer texts.

    Attributes:
      theta: base of the wavelengths.
      window_theta: base in the layers with a window (Gemma 3), which no scaling stretches; null treats layers alike.
      scaling: stretches the wavelengths: all alike (`linear`), the long ones (`llama3`), or by number of turns (`yarn`,
        Peng et al. 2023).
      factor: how many times longer the texts may become.
      original_length: length of the texts before the stretch; `llama3` and `yarn` need it.
      low_frequency: number of turns in the original length below which `llama3` stretches by the full factor.
      high_frequency: number of turns above which `llama3` stretches nothing.
      beta_fast: number of turns above which `yarn` stretches nothing.
      beta_slow: number of turns below which `yarn` stretches by the full factor.
      magnitude: factor on rotated queries and keys under `yarn`; null is 0.1 log(factor) + 1.
      truncate: whether `yarn` rounds the ends of its ramp to whole dimensions.
    """

    theta: float = 10_000.0
    window_theta: float | None = None
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_length: int | None = None
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float | None = None
    truncate: bool = True

    def problems(self) -> list[tuple[str, str]]:
        """Returns the errors in these values, as (dotted path, message)."""
        found = [
            (name, "expected a positive number")
            for name in ("theta", "window_theta", "factor", "original_length", "magnitude")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if self.scaling in ("llama3", "yarn") and self.original_length is None:
            found.append(("original_length", f"scaling {self.scaling} needs the length before the stretch"))
        if self.scaling == "none" and self.factor != 1:
            found.append(("factor", "without a scaling nothing is stretched: name one (linear, llama3, yarn)"))
        if not self.low_frequency < self.high_frequency:
            found.append(("high_frequency", f"must be above low_frequency {self.low_frequency}"))
        if not self.beta_slow < self.beta_fast:
            found.append(("beta_fast", f"must be above beta_slow {self.beta_slow}"))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(Part):
    """The shape of a decoder.

    Attributes:
      vocab: number of token ids; null takes the tokenizer's.
      dim: width of the residual stream.
      layers: number of layers.
      heads: number of query heads.
      kv_heads: number of key and value heads, each shared by heads / kv_heads query heads; null is `heads`.
      head_dim: width of a head; null is dim / heads.
      hidden: width of the feed-forward layers; null is 4 x dim.
      length: largest number of tokens in a text.
      norm: root mean square (`rms`), the same with a scale stored around zero (`rms_one_plus`, Gemma), or `layer`.
      norm_eps: number added to the variance in every norm.
      post_norms: also normalise what each sublayer adds to the residual stream (Gemma).
      activation: nonlinearity of the feed-forward layers; `gelu_tanh` is GELU's approximation by tanh.
      gated: multiply it by a second projection, as SwiGLU and GeGLU do.
      positions: rotary embeddings, or a learned vector for each position (GPT-2).
      rope: the rotary embeddings; unread with learned positions.
      window: number of tokens, itself included, that a token sees in the layers with a window; null has no windows.
      pattern: kinds of layers, repeated over all layers; empty means that all have the window, if there is one.
      qk_norm: normalise queries and keys of each head (Qwen 3, Gemma 3).
      qkv_bias: queries, keys and values have a bias.
      out_bias: the output projection of attention has a bias.
      mlp_bias: feed-forward layers have a bias.
      query_scalar: queries are divided by its square root; null is head_dim.
      attention_cap: soft cap c of attention logits, c tanh(x / c).
      final_cap: soft cap of the logits over the vocabulary.
      tied: the head over the vocabulary is the embedding, transposed.
      embed_scale: multiply embeddings by sqrt(dim).
      dropout: rate of dropout on embeddings and on what each sublayer adds.
      remat: how much of a layer the backward pass recomputes: nothing, all but matmuls (`dots`) or all (`full`).
    """

    sort: ClassVar[str] = "text"
    label: ClassVar[str] = "decoder"

    kind: Literal["decoder"] = "decoder"
    vocab: int | None = None
    dim: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    length: int = 1024
    norm: Literal["rms", "rms_one_plus", "layer"] = "rms"
    norm_eps: float = 1e-6
    post_norms: bool = False
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    gated: bool = True
    positions: Literal["rope", "learned"] = "rope"
    rope: Rope = Rope()
    window: int | None = None
    pattern: tuple[LayerKind, ...] = ()
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_scalar: float | None = None
    attention_cap: float | None = None
    final_cap: float | None = None
    tied: bool = True
    embed_scale: bool = False
    dropout: float = 0.0
    remat: Literal["none", "dots", "full"] = "none"

    @property
    def key_heads(self) -> int:
        """The number of key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def width(self) -> int:
        """The width of a head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def inner(self) -> int:
        """The width of the feed-forward layers."""
        return 4 * self.dim if self.hidden is None else self.hidden

    @property
    def scale(self) -> float:
        """The factor on the products of queries and keys."""
        return float(self.width if self.query_scalar is None else self.query_scalar) ** -0.5

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        pattern: tuple[LayerKind, ...] = ("full",)
        if self.window is not None:
            pattern = self.pattern or ("window",)
        return tuple(pattern[layer % len(pattern)] for layer in range(self.layers))

    def problems(self) -> list[tuple[str, str]]:
        """Returns the errors that no value of another section could mend, as (dotted path, message)."""
        optional = ("vocab", "kv_heads", "head_dim", "hidden", "window", "query_scalar", "attention_cap", "final_cap")
        found = [
            (name, "expected a positive number")
            for name in ("dim", "layers", "heads", "length", "norm_eps", *optional)
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if not 0 <= self.dropout < 1:
            found.append(("dropout", "expected a rate in [0, 1)"))
        if not found and self.head_dim is None and self.dim % self.heads:
            found.append(("heads", f"must divide dim {self.dim}, unless head_dim is given"))
        if not found and self.heads % self.key_heads:
            found.append(("kv_heads", f"must divide heads {self.heads}"))
        if not found and self.positions == "rope" and self.width % 2:
            found.append(("head_dim", f"rotary embeddings turn pairs: expected an even width, got {self.width}"))
        if self.pattern and self.window is None:
            found.append(("pattern", "names layers with a window, but window is not set"))
        if self.rope.window_theta is not None and self.window is None:
            found.append(("rope.window_theta", "is of the layers with a window, but window is not set"))
        return found

    def all_problems(self) -> list[tuple[str, str]]:
        """Returns the errors of this and of its rotary embeddings, where no configuration has looked for them."""
        return self.problems() + [(f"rope.{name}", message) for name, message in self.rope.problems()]

    def mesh_problems(self, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
        """Returns everything that does not go on a mesh of these sizes, as (dotted path, message)."""
        ways = sizes["tensor"]
        shared = {"heads": self.heads, "kv_heads": self.key_heads, "hidden": self.inner}
        bad = [f"model.{name} {count}" for name, count in shared.items() if count % ways]
        return [("mesh.tensor", f"{ways} does not divide {' and '.join(bad)}")] if bad else []
