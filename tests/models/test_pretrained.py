"""Folders of others: config.json both ways, weights bit for bit and by slices, and one message for each broken one."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_fixtures import FOLDER, NAMES

from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.core.safetensors import open_safetensors, save_safetensors
from jaxops.core.sharding import map_named, named_leaves, parameter_shardings
from jaxops.core.weights import load_weights, targets_of, with_arrays
from jaxops.models.decoder import tensors
from jaxops.models.decoder.architecture import Architecture, Rope
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.decoder.huggingface import architecture_of, canonical, config_json
from jaxops.models.decoder.pretrained import open_pretrained, save_pretrained


def loaded(folder, dtype=jnp.bfloat16, mesh=None):
    """(architecture, parameters) of a folder, on the shardings of a mesh."""
    found = open_pretrained(folder)
    decoder = Decoder(found.architecture)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), decoder.shapes)
    targets = targets_of(shapes)
    if mesh is not None:
        shardings = dict(named_leaves(parameter_shardings(shapes, decoder.rules, mesh)))
        targets = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[p]) for p, x in targets.items()}
    arrays, plan = load_weights(targets, [found.source])
    assert plan.left == () and plan.skipped == {}
    return found.architecture, with_arrays(shapes, arrays)


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_in_and_out_bit_for_bit(name, tmp_path):
    architecture, params = loaded(FOLDER / name)
    save_pretrained(tmp_path, architecture, params, {"eos_token_id": [1, 2]}, shard_bytes=10_000)
    before, after = open_safetensors(FOLDER / name), open_safetensors(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert set(after) == set(before)
    for path, x in before.items():
        assert after[path].dtype == x.dtype and after[path].shape == x.shape
        assert after[path].tobytes() == x.tobytes()
    again = open_pretrained(tmp_path)
    assert again.architecture == architecture and again.special == {"eos_token_id": [1, 2]}
    written = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((FOLDER / name / "config.json").read_text())
    assert written["model_type"] == original["model_type"] and written["architectures"] == original["architectures"]
    assert written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "llama2"])
def test_every_device_reads_its_own_slices_and_no_more(name, monkeypatch):
    _, whole = loaded(FOLDER / name)
    read = []
    plain = tensors.View.__getitem__

    def counted(self, index):
        part = plain(self, index)
        read.append(part.nbytes)
        return part

    monkeypatch.setattr(tensors.View, "__getitem__", counted)
    _, params = loaded(FOLDER / name, mesh=make_mesh(fsdp=4, tensor=2))
    split = dict(named_leaves(params))
    kernel = split["layers/attention/query/kernel"]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")
    for path, x in named_leaves(whole):
        assert np.asarray(split[path]).tobytes() == np.asarray(x).tobytes()
    assert sum(read) == sum(x.nbytes for x in split.values())
    assert max(read) <= max(x.nbytes for x in split.values()) // 4


def test_rows_of_the_vocabulary_that_are_padding_are_zero_and_not_written(tmp_path):
    architecture, params = loaded(FOLDER / "llama2")
    assert params["embed"]["embedding"].shape == (128, 32) and params["head"]["kernel"].shape == (32, 128)
    assert not params["embed"]["embedding"][96:].any() and not params["head"]["kernel"][:, 96:].any()
    params["embed"]["embedding"][96:] = np.inf  # what stands there is nobody's business
    save_pretrained(tmp_path, architecture, params)
    assert open_safetensors(tmp_path)["model.embed_tokens.weight"].shape == (96, 32)


def test_a_bare_models_names_and_old_constants_are_understood(tmp_path):
    found = open_safetensors(FOLDER / "gpt2")
    bare = {name.removeprefix("transformer."): x for name, x in found.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32), "lm_head.weight": bare["wte.weight"]}
    save_safetensors(tmp_path / "model.safetensors", bare)
    shutil.copy(FOLDER / "gpt2" / "config.json", tmp_path)
    for (path, a), (_, b) in zip(
        named_leaves(loaded(tmp_path)[1]), named_leaves(loaded(FOLDER / "gpt2")[1]), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_old_and_new_forms_of_rope_are_one():
    new = json.loads((FOLDER / "gemma3" / "config.json").read_text())
    rope = new.pop("rope_parameters")
    full = rope["full_attention"]
    old = new | {
        "rope_theta": full["rope_theta"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "rope_scaling": {"type": "linear", "factor": full["factor"]},
    }
    assert architecture_of(old) == architecture_of(new | {"rope_parameters": rope})
    assert architecture_of(old).rope == Rope(theta=1000.0, window_theta=50.0, scaling="linear", factor=2.0)
    assert architecture_of(old).pattern == ("window", "window", "full")


def test_published_configs_that_leave_values_out():
    gemma = architecture_of({"model_type": "gemma2", "vocab_size": 256_000})
    assert (gemma.dim, gemma.head_dim, gemma.layers, gemma.window) == (2304, 256, 26, 4096)
    assert gemma.pattern == ("window", "full") and (gemma.attention_cap, gemma.final_cap) == (50.0, 30.0)
    assert gemma.layer_kinds == ("window", "full") * 13
    qwen = {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "sliding_window": 32_768}
    found = architecture_of({**qwen, "num_key_value_heads": 2, "use_sliding_window": False})
    assert (found.window, found.head_dim, found.qkv_bias, found.out_bias) == (None, 64, True, False)
    gemma3 = architecture_of({"model_type": "gemma3_text", "num_hidden_layers": 18, "sliding_window": 512})
    assert gemma3.pattern == ("window",) * 5 + ("full",) and gemma3.rope == Rope(theta=1e6, window_theta=1e4)
    assert architecture_of({"model_type": "gpt2"}).hidden == 3072


@pytest.mark.parametrize("change", [{}, {"window": 8}, {"qkv_bias": True}, {"qk_norm": True, "tied": False}], ids=str)
def test_an_architecture_of_ones_own_is_written_as_the_type_that_computes_it(change):
    a = Architecture(vocab=100, kv_heads=2, remat="full", dropout=0.1, **change)
    wanted = dataclasses.replace(canonical(a), remat="none", dropout=0.0)
    assert architecture_of(config_json(a)) == wanted
    types = {"window": "mistral", "qkv_bias": "qwen2", "qk_norm": "qwen3"}
    assert config_json(a)["model_type"] == next((types[key] for key in change), "llama")


def test_an_architecture_that_no_type_has_is_refused():
    with pytest.raises(UserError, match="the nearest, llama, has another final_cap"):
        config_json(Architecture(vocab=100, final_cap=3.0))


CONFIG = json.loads((FOLDER / "llama3" / "config.json").read_text())
WITHOUT_ROPE = {key: value for key, value in CONFIG.items() if key != "rope_parameters"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIG, "model_type": "lama"}, "model_type 'lama' is not known.*did you mean 'llama'"),
        ({**CONFIG, "model_type": None}, "model_type 'None' is not known"),
        ({**CONFIG, "num_local_experts": 8}, "num_local_experts is '8', which the decoder does not compute"),
        ({**CONFIG, "quantization_config": {"bits": 4}}, "quantization_config is .* does not compute"),
        ({**CONFIG, "hidden_act": "gelu_pytorch_than"}, "hidden_act is .*did you mean 'gelu_pytorch_tanh'"),
        ({**CONFIG, "hidden_size": "big"}, "hidden_size is 'big', expected a positive integer"),
        ({**CONFIG, "rms_norm_eps": 0}, "rms_norm_eps is '0', expected a positive number"),
        ({**CONFIG, "tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({**CONFIG, "num_key_value_heads": 3}, "kv_heads: must divide heads 4"),
        ({**WITHOUT_ROPE, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope: type 'dynamic' is not known"),
        ({**WITHOUT_ROPE, "rope_scaling": {"rope_type": "linear"}}, "rope linear: factor is 'None'"),
        ({**WITHOUT_ROPE, "rope_parameters": {"partial_rotary_factor": 0.5}}, "only whole heads are turned"),
        ({**WITHOUT_ROPE, "rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": 1.0}}, "mscale is not known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_asks_for_something_else_is_refused(config, message):
    with pytest.raises(UserError, match=rf"config\.json: .*{message}|config\.json: {message}"):
        architecture_of(config)


ODD = (None, "x", -1, 0, 10**12, float("nan"), True, [[1]], {"a": [1]})
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in ("gpt2", "mistral")]


@pytest.mark.parametrize("name", ["gpt2", "mistral", *SLOW])
def test_whatever_stands_in_a_config_there_is_an_architecture_or_one_message(name):
    config = json.loads((FOLDER / name / "config.json").read_text())
    rope = config.pop("rope_parameters", {})
    keys = [*config, "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "n_inner", "head_dim"]
    tried = [config | {"rope_parameters": rope, key: value} for key in keys for value in ODD]
    tried += [config | {"rope_parameters": rope | {key: value}} for key in [*rope, "rope_type"] for value in ODD]
    refused = 0
    for each in tried:
        try:
            found = architecture_of(each)
        except UserError as error:
            assert "config.json: " in str(error) and "Traceback" not in str(error)
            refused += 1
        else:
            assert found.all_problems() == []
    assert 20 < refused < len(tried)


def broken(tmp_path, change, name="llama2"):
    """A copy of a fixture with some of its tensors changed."""
    found = {path: np.array(x) for path, x in open_safetensors(FOLDER / name).items()}
    change(found)
    save_safetensors(tmp_path / "model.safetensors", found)
    shutil.copy(FOLDER / name / "config.json", tmp_path)
    return tmp_path


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop(UP), f"missing: {UP}"),
        (lambda x: x.update({"model.layers.1.mlp.up_projj.weight": x.pop(UP)}), "did you mean '.*up_projj"),
        (lambda x: x.update(more=x[UP]), "holds tensors that its architecture has not: more"),
        (lambda x: x.update({UP: x[UP][:40]}), r"up_proj.weight is \[40, 32\], expected \[48, 32\]"),
        (lambda x: x[UP].__setitem__((3, 4), np.nan), f"{UP} holds numbers that are not finite"),
        (lambda x: x[UP].__setitem__((3, 4), np.inf), f"{UP} holds numbers that are not finite"),
    ],
    ids=["missing", "misspelt", "left over", "shape", "nan", "infinity"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        loaded(broken(tmp_path, change))


def test_files_that_are_cut_or_missing_are_refused(tmp_path):
    architecture, params = loaded(FOLDER / "llama2")
    save_pretrained(tmp_path, architecture, params, shard_bytes=20_000)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match="eos_token_id is '</s>', expected a token id"):
        open_pretrained(tmp_path)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=f"{last.name} is truncated"):
        open_pretrained(tmp_path)
    last.unlink()
    with pytest.raises(UserError, match=f"names {last.name}, which is not there"):
        open_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is no JSON"):
        open_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: there is no such file"):
        open_pretrained(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        open_pretrained(tmp_path / "none")


def test_what_cannot_be_written_is_refused(tmp_path):
    architecture, params = loaded(FOLDER / "llama2", jnp.float32)
    large = map_named(lambda path, x: x * 1e6 if path == "norm/scale" else x, params)
    with pytest.raises(UserError, match="norm/scale holds numbers that do not fit into float16"):
        save_pretrained(tmp_path, architecture, large, dtype=np.float16)
    with pytest.raises(UserError, match="norm/scale holds numbers that are not finite"):
        save_pretrained(
            tmp_path,
            architecture,
            map_named(lambda p, x: x * np.nan, {"norm": params["norm"]})
            | {key: value for key, value in params.items() if key != "norm"},
        )
    with pytest.raises(UserError, match="'eos_token' is not known; did you mean 'eos_token_id'"):
        save_pretrained(tmp_path, architecture, params, {"eos_token": 1})
    save_pretrained(tmp_path, architecture, params)
    with pytest.raises(UserError, match=r"holds weights already \(model.safetensors\): name another folder"):
        save_pretrained(tmp_path, architecture, params)
    other = dataclasses.replace(architecture, vocab=200)
    with pytest.raises(UserError, match=r"embed/embedding is \[128, 32\], expected \[256, 32\]"):
        save_pretrained(tmp_path / "b", other, params)
    with pytest.raises(UserError, match="norm/scale is missing, more is no parameter"):
        save_pretrained(
            tmp_path / "b", architecture, {k: x for k, x in params.items() if k != "norm"} | {"more": np.ones(2)}
        )
