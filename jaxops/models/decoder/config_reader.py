"""Reading the values of Hugging Face's `config.json`: the defaults of each model type, one message for each error.

huggingface.py makes an architecture of them. Tested in tests/models/test_pretrained.py.
"""

from collections.abc import Mapping
from typing import Any, Literal

from jaxops.core.failures import UserError, nearest

_LLAMA_LIKE = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
}
_GEMMA = {
    **_LLAMA_LIKE,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_QWEN = {
    **_LLAMA_LIKE,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 2048},
    "mistral": {
        **_LLAMA_LIKE,
        "vocab_size": 32_000,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma2": {
        **_GEMMA,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window_pattern": 2,
    },
    "gemma3_text": {
        **_GEMMA,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
    "gpt2": {
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
}
"""Model types, with the values that a `config.json` need not give."""

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "gelu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None,),
}
"""Keys of features that the decoder does not have, with the values that do not ask for them."""


MOST = 2**31 - 1
"""The largest integer that a size may be."""
MOST_LAYERS = 4096


def is_positive(value: Any) -> bool:
    """Returns whether a value is a number above zero, and finite."""
    return type(value) in (int, float) and 0 < value < 1e30


class Reader:
    """The values of a `config.json`, with the defaults of its model type."""

    def __init__(self, model_type: str, config: Mapping[str, Any], where: str):
        self.type, self.config, self.where = model_type, config, where
        self._defaults = DEFAULTS[model_type]

    def refuse(self, key: str, expected: str) -> UserError:
        """Returns the error that says which value was expected at this key."""
        return UserError(f"{self.where}: {key} is {str(self.config.get(key))[:80]!r}, expected {expected}")

    def get(self, key: str) -> Any:
        """Returns the value, or the default of the model type, or None."""
        return self.config[key] if key in self.config else self._defaults.get(key)

    def whole(self, key: str) -> int:
        """Returns a positive integer; raises UserError if there is another value."""
        value = self.get(key)
        if type(value) is not int or not 0 < value <= MOST:
            raise self.refuse(key, "a positive integer")
        return value

    def optional_whole(self, key: str) -> int | None:
        """Returns a positive integer, or None where the value is null."""
        return None if self.get(key) is None else self.whole(key)

    def number(self, key: str) -> float:
        """Returns a positive number; raises UserError if there is another value."""
        value = self.get(key)
        if not is_positive(value):
            raise self.refuse(key, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Returns a positive number, or None where the value is null."""
        return None if self.get(key) is None else self.number(key)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Returns a mapping, empty where the value is null; raises UserError if there is another value."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.refuse(key, "a mapping")
        return value or {}

    def flag(self, key: str) -> bool:
        """Returns a boolean, false where the value is null; raises UserError if there is another value."""
        value = self.get(key)
        if value is None:
            return False
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def activation(self, key: str) -> Literal["silu", "gelu_tanh", "gelu"]:
        """Returns the nonlinearity of this name; raises UserError if it is not known."""
        name = self.get(key)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise self.refuse(key, f"one of {', '.join(ACTIVATIONS)}{nearest(str(name), ACTIVATIONS)}")
        return ACTIVATIONS[name]
