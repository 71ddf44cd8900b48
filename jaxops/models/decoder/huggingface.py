"""Hugging Face's `config.json` to an architecture and back.

A value that the decoder does not compute is refused, never ignored. Where a key is missing, the default of its model
type in `transformers` holds. Tested in tests/models/test_pretrained.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxops.core.failures import UserError, nearest
from jaxops.models.decoder.architecture import Architecture, LayerKind, Rope
from jaxops.models.decoder.config_reader import DEFAULTS, MOST_LAYERS, UNSUPPORTED, Reader, is_positive

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def architecture_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Returns the architecture that a `config.json` describes; `where` names the file in messages.

    Rates of dropout are not taken over: they belong to a training, not to weights.

    Raises:
      UserError: the model type is unknown, or a value is invalid or asks for what the decoder does not compute.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        raise UserError(
            f"{where}: model_type {str(model_type)[:80]!r} is not known (known: {', '.join(DEFAULTS)})"
            f"{nearest(str(model_type), DEFAULTS)}"
        )
    read = Reader(model_type, config, where)
    layers = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    if read.whole(layers) > MOST_LAYERS:
        raise read.refuse(layers, f"at most {MOST_LAYERS}")
    for key, allowed in UNSUPPORTED.items():
        if not any(config.get(key) is value or config.get(key) == value for value in allowed):
            raise UserError(f"{where}: {key} is {str(config[key])[:80]!r}, which the decoder does not compute")
    found = _gpt2(read) if model_type == "gpt2" else _llama_like(read)
    if bad := found.all_problems():
        raise UserError(f"{where}: " + "; ".join(f"{path}: {message}" for path, message in bad))
    return canonical(found)


def canonical(a: Architecture) -> Architecture:
    """Returns the architecture with every null that has a meaning spelled out, and what is unread at its default."""
    kinds, rope = a.layer_kinds, a.rope
    period = next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    windowed = "window" in kinds
    if a.positions == "learned":
        rope = Rope()
    elif "full" not in kinds and rope.window_theta is not None:
        rope = Rope(theta=rope.window_theta)
    elif not windowed or (rope.window_theta == rope.theta and rope.scaling == "none"):
        rope = dataclasses.replace(rope, window_theta=None)
    return dataclasses.replace(
        a,
        kv_heads=a.key_heads,
        head_dim=a.width,
        hidden=a.inner,
        window=a.window if windowed else None,
        pattern=kinds[:period] if windowed and "full" in kinds else (),
        query_scalar=float(a.width if a.query_scalar is None else a.query_scalar),
        rope=rope,
    )


def _gpt2(read: Reader) -> Architecture:
    return Architecture(
        vocab=read.whole("vocab_size"),
        dim=read.whole("n_embd"),
        layers=read.whole("n_layer"),
        heads=read.whole("n_head"),
        hidden=read.optional_whole("n_inner"),
        length=read.whole("n_positions"),
        norm="layer",
        norm_eps=read.number("layer_norm_epsilon"),
        activation=read.activation("activation_function"),
        gated=False,
        positions="learned",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=read.flag("tie_word_embeddings"),
    )


def _llama_like(read: Reader) -> Architecture:
    gemma, bias = read.type.startswith("gemma"), read.flag("attention_bias")
    window, pattern = _windows(read)
    activation = "hidden_activation" if gemma and read.config.get("hidden_activation") else "hidden_act"
    return Architecture(
        vocab=read.whole("vocab_size"),
        dim=read.whole("hidden_size"),
        layers=read.whole("num_hidden_layers"),
        heads=read.whole("num_attention_heads"),
        kv_heads=read.optional_whole("num_key_value_heads"),
        head_dim=read.optional_whole("head_dim"),
        hidden=read.whole("intermediate_size"),
        length=read.whole("max_position_embeddings"),
        norm="rms_one_plus" if gemma else "rms",
        norm_eps=read.number("rms_norm_eps"),
        post_norms=gemma,
        activation=read.activation(activation),
        rope=_rope(read, window is not None),
        window=window,
        pattern=pattern,
        qk_norm=read.type in ("qwen3", "gemma3_text"),
        qkv_bias=bias or read.type == "qwen2",
        out_bias=bias and read.type != "qwen2",
        mlp_bias=read.flag("mlp_bias") and read.type == "llama",
        query_scalar=read.optional_number("query_pre_attn_scalar") if gemma else None,
        attention_cap=read.optional_number("attn_logit_softcapping") if gemma else None,
        final_cap=read.optional_number("final_logit_softcapping") if gemma else None,
        tied=read.flag("tie_word_embeddings"),
        embed_scale=gemma,
    )


def _windows(read: Reader) -> tuple[int | None, tuple[LayerKind, ...]]:
    """Returns the window, or None, and the kind of each layer; no kinds where all are alike."""
    window = read.optional_whole("sliding_window")
    if read.type == "llama" or window is None or (read.type.startswith("qwen") and not read.flag("use_sliding_window")):
        return None, ()
    if read.type == "mistral":
        return window, ()
    layers, named = read.whole("num_hidden_layers"), read.config.get("layer_types")
    kinds: list[LayerKind]
    if named is not None:
        known: dict[str, LayerKind] = {"full_attention": "full", "sliding_attention": "window"}
        if not isinstance(named, list) or len(named) != layers or not all(str(kind) in known for kind in named):
            raise read.refuse("layer_types", f"{layers} times full_attention or sliding_attention")
        kinds = [known[kind] for kind in named]
    elif read.type.startswith("qwen"):
        first = read.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise read.refuse("max_window_layers", "a number of layers")
        kinds = ["window" if layer >= first else "full" for layer in range(layers)]
    else:
        every = read.whole("sliding_window_pattern")
        kinds = ["window" if (layer + 1) % every else "full" for layer in range(layers)]
    return (window, tuple(kinds)) if "window" in kinds else (None, ())


def _rope(read: Reader, windows: bool) -> Rope:
    """Reads the rotary embeddings in the form of transformers 5 (`rope_parameters`) or 4."""
    given = read.mapping("rope_parameters")
    if not given:
        local_theta = read.number("rope_local_base_freq") if read.type == "gemma3_text" and windows else None
        return _scaled(read, {"rope_theta": read.get("rope_theta"), **read.mapping("rope_scaling")}, local_theta)
    if "full_attention" not in given and "sliding_attention" not in given:
        return _scaled(read, {"rope_theta": read.get("rope_theta"), **given}, None)
    of_full, of_window = given.get("full_attention") or {}, given.get("sliding_attention") or {}
    if not isinstance(of_full, Mapping) or not isinstance(of_window, Mapping):
        raise read.refuse("rope_parameters", "a mapping for each kind of layer")
    full = {"rope_theta": read.get("rope_theta"), **of_full}
    local = {"rope_theta": read.get("rope_local_base_freq"), **of_window}
    if local.get("rope_type", "default") != "default":
        raise read.refuse("rope_parameters", "no scaling in layers with a window")
    if windows and not is_positive(local["rope_theta"]):
        raise read.refuse("rope_parameters", "a positive rope_theta in layers with a window")
    return _scaled(read, full, float(local["rope_theta"]) if windows else None)


def _scaled(read: Reader, values: Mapping[str, Any], window_theta: float | None) -> Rope:
    """Returns the rotary embeddings of one set of values, as `rope_parameters` or `rope_scaling` hold them."""
    where, kind = f"{read.where}: rope", values.get("rope_type", values.get("type", "default"))
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(
            f"{where}: partial_rotary_factor {values['partial_rotary_factor']}: only whole heads are turned"
        )

    def number(key: str, default: float | None = None) -> float:
        given: Any = values.get(key)
        value: Any = default if given is None else given
        if not is_positive(value):
            raise UserError(f"{where} {kind}: {key} is {str(value)[:40]!r}, expected a positive number")
        return float(value)

    theta = number("rope_theta")
    if kind == "default":
        return Rope(theta=theta, window_theta=window_theta)
    if kind == "linear":
        return Rope(theta=theta, window_theta=window_theta, scaling="linear", factor=number("factor"))
    length = read.whole("max_position_embeddings")
    original = int(number("original_max_position_embeddings", float(length)))
    if kind == "llama3":
        return Rope(
            theta=theta,
            window_theta=window_theta,
            scaling="llama3",
            factor=number("factor"),
            original_length=original,
            low_frequency=number("low_freq_factor"),
            high_frequency=number("high_freq_factor"),
        )
    if kind == "yarn":
        if values.get("mscale") is not None or values.get("mscale_all_dim") is not None:
            raise UserError(f"{where} yarn: mscale is not known; expected attention_factor")
        magnitude = None if values.get("attention_factor") is None else number("attention_factor")
        return Rope(
            theta=theta,
            window_theta=window_theta,
            scaling="yarn",
            factor=number("factor", length / original),
            original_length=original,
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            magnitude=magnitude,
            truncate=values.get("truncate") is not False,
        )
    known = ("default", "linear", "llama3", "yarn")
    raise UserError(
        f"{where}: type {str(kind)[:40]!r} is not known (known: {', '.join(known)}){nearest(str(kind), known)}"
    )


def config_json(a: Architecture) -> dict[str, Any]:
    """Returns the `config.json` of an architecture, of the first model type that computes exactly it.

    Raises:
      UserError: no model type of transformers has this combination; the message names the nearest and what differs.
    """
    if a.vocab is None:
        raise UserError("model.vocab: a config.json needs the number of token ids")
    wanted = canonical(dataclasses.replace(a, dropout=0.0, remat="none"))
    apart: dict[str, list[str]] = {}
    for model_type, write in _WRITERS.items():
        config = {"model_type": model_type, "architectures": [_CLASSES[model_type]], **write(wanted)}
        got = architecture_of(config)
        differing = [f.name for f in dataclasses.fields(a) if getattr(got, f.name) != getattr(wanted, f.name)]
        if not differing:
            return config
        apart[model_type] = differing
    closest = min(apart, key=lambda model_type: len(apart[model_type]))
    raise UserError(
        f"no model type of transformers is this architecture: the nearest, {closest}, has another"
        f" {', '.join(apart[closest])}"
    )


def _write_gpt2(a: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": a.vocab,
        "n_embd": a.dim,
        "n_layer": a.layers,
        "n_head": a.heads,
        "n_inner": a.inner,
        "n_positions": a.length,
        "layer_norm_epsilon": a.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(a.activation, a.activation),
        "tie_word_embeddings": a.tied,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _write_common(a: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": a.vocab,
        "hidden_size": a.dim,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.key_heads,
        "head_dim": a.width,
        "intermediate_size": a.inner,
        "max_position_embeddings": a.length,
        "rms_norm_eps": a.norm_eps,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(a.activation, a.activation),
        "tie_word_embeddings": a.tied,
        "rope_theta": a.rope.theta,
        **({} if a.rope.scaling == "none" else {"rope_scaling": _write_scaling(a.rope)}),
    }


def _write_scaling(rope: Rope) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear":
        found["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        found |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    if rope.scaling == "yarn":
        found |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.magnitude is not None:
            found["attention_factor"] = rope.magnitude
    return found


def _write_llama(a: Architecture) -> dict[str, Any]:
    return {**_write_common(a), "attention_bias": a.qkv_bias, "mlp_bias": a.mlp_bias}


def _write_mistral(a: Architecture) -> dict[str, Any]:
    return {**_write_common(a), "sliding_window": a.window}


def _write_kinds(a: Architecture) -> list[str]:
    return [{"full": "full_attention", "window": "sliding_attention"}[kind] for kind in a.layer_kinds]


def _write_qwen(a: Architecture) -> dict[str, Any]:
    windows: dict[str, Any] = {"use_sliding_window": a.window is not None, "sliding_window": a.window}
    if a.window is not None:
        first = a.layer_kinds.index("window")
        windows |= {"layer_types": _write_kinds(a), "max_window_layers": first}
    return {**_write_common(a), "attention_bias": a.out_bias, **windows}


def _write_gemma(a: Architecture) -> dict[str, Any]:
    common = _write_common(a)
    return {
        **common,
        "hidden_activation": common["hidden_act"],
        "query_pre_attn_scalar": _plain_number(a.query_scalar or a.width),
        "attn_logit_softcapping": a.attention_cap,
        "final_logit_softcapping": a.final_cap,
        "sliding_window": a.window,
        "layer_types": _write_kinds(a),
        "attention_bias": a.qkv_bias,
    }


def _write_gemma3(a: Architecture) -> dict[str, Any]:
    return {**_write_gemma(a), "rope_local_base_freq": a.rope.window_theta or a.rope.theta}


def _plain_number(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x


_WRITERS: dict[str, Callable[[Architecture], dict[str, Any]]] = {
    "llama": _write_llama,
    "mistral": _write_mistral,
    "qwen2": _write_qwen,
    "qwen3": _write_qwen,
    "gemma2": _write_gemma,
    "gemma3_text": _write_gemma3,
    "gpt2": _write_gpt2,
}
