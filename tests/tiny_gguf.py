"""A tiny model in the form of SmolLM2-135M-Instruct's file, for configs that name it: the download is 93 MB."""

import dataclasses
import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxops.data import sources
from jaxops.data.text.open_tokenizer import open_tokenizer

NAME = "smollm2_135m_instruct"
WORDS = Path(__file__).parent / "fixtures" / "text" / "tiny"
DIM, HEADS, HIDDEN, LENGTH, LAYERS = 32, 4, 48, 1024, 2


def write_gguf(path: Path) -> None:
    """Writes a Llama with tied embeddings, drawn from a seed, and a vocabulary with a chat template."""
    words = open_tokenizer(str(WORDS))
    whole = json.loads(words.files["tokenizer.json"])
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.token(at) for at in range(words.vocab)])
    plain = {one["content"] for one in whole["added_tokens"] if not one["special"]}
    kind = lambda at: 3 if at in words.special else 4 if words.token(at) in plain else 1
    writer.add_token_types([kind(at) for at in range(words.vocab)])
    writer.add_token_merges([" ".join(pair) for pair in whole["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(words.template)
    kernel = lambda *shape: (draw.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
    writer.add_tensor("token_embd.weight", kernel(words.vocab, DIM))
    writer.add_tensor("output_norm.weight", np.ones(DIM, np.float32))
    for at in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"blk.{at}.{name}.weight", kernel(DIM, DIM))
        for name, shape in (("gate", (HIDDEN, DIM)), ("up", (HIDDEN, DIM)), ("down", (DIM, HIDDEN))):
            writer.add_tensor(f"blk.{at}.ffn_{name}.weight", kernel(*shape))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{at}.{name}.weight", np.ones(DIM, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_smollm2(patch: pytest.MonkeyPatch) -> None:
    """Puts the tiny model where the named one is kept, checksum and all."""
    source = sources.find_source(NAME)
    source.path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(source.path)
    digest = hashlib.sha256(source.path.read_bytes()).hexdigest()
    patch.setitem(sources.SOURCES, NAME, dataclasses.replace(source, sha256=digest))
