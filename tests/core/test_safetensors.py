"""Safetensors: the same bits back for every dtype, little read, and every damaged file refused by name."""

import json
import os
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.core.safetensors import DTYPES, INDEX, open_safetensors, save_safetensors


def bits(dtype, shape, seed=0):
    """An array of random bits (of 0 and 1 for booleans): not-a-numbers, infinities and subnormals too."""
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return (raw % 2 if dtype.kind == "b" else raw).view(dtype).reshape(shape)


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("shape", [(3, 5), (), (7,), (0, 4), (2, 1, 3)])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, shape):
    arrays = {name: bits(dtype, shape, at) for at, (name, dtype) in enumerate(DTYPES.items())}
    save_safetensors(tmp_path / "a.safetensors", arrays, {"format": "pt"})
    found = open_safetensors(tmp_path / "a.safetensors")
    assert list(found) == list(arrays)
    for name, x in found.items():
        assert (x.dtype, x.shape) == (arrays[name].dtype, shape)
        assert x.tobytes() == arrays[name].tobytes()
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_bytes_are_the_formats_own(tmp_path):
    path = tmp_path / "deep" / "a.safetensors"
    save_safetensors(path, {"x": jnp.arange(3, dtype=jnp.bfloat16), "y": np.arange(6, dtype="<i2").reshape(2, 3).T})
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert (8 + length) % 8 == 0
    assert json.loads(raw[8 : 8 + length]) == {
        "x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "y": {"dtype": "I16", "shape": [3, 2], "data_offsets": [6, 18]},
    }
    assert raw[8 + length :] == np.array([0, 0x3F80, 0x4000], "<u2").tobytes() + struct.pack("<6h", 0, 3, 1, 4, 2, 5)


def test_arrays_that_begin_unaligned_are_read(tmp_path):
    values = np.arange(5, dtype=np.float64)
    header = {"flag": entry("BOOL", (1,), (0, 1)), "x": entry("F64", (5,), (1, 41)), "b": entry("BF16", (2,), (41, 45))}
    half = np.array([1.5, -2], ml_dtypes.bfloat16)
    write(tmp_path / "a.safetensors", header, b"\1" + values.tobytes() + half.tobytes())
    found = open_safetensors(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(found["x"], values)
    np.testing.assert_array_equal(np.array(found["b"]), half)


def test_opening_reads_headers_only(tmp_path):
    """A file with a hole of a gigabyte: its pages are touched where it is sliced."""
    size = 1 << 30
    path = write(tmp_path / "a.safetensors", {"x": entry("U8", (size,), (0, size))})
    os.truncate(path, path.stat().st_size + size)
    x = open_safetensors(path)["x"]
    assert isinstance(x, np.memmap) and x.shape == (size,) and not x.flags.writeable
    assert x[size // 2 : size // 2 + 4].tolist() == [0] * 4


def shards(folder):
    arrays = {name: bits(np.dtype(np.float32), (2, 3), at) for at, name in enumerate("abc")}
    save_safetensors(folder / "model-1.safetensors", {"a": arrays["a"], "b": arrays["b"]})
    save_safetensors(folder / "model-2.safetensors", {"c": arrays["c"]})
    places = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": places}))
    return arrays, places


def test_a_folder_of_shards_is_one(tmp_path):
    arrays, _ = shards(tmp_path)
    found = open_safetensors(tmp_path)
    assert sorted(found) == ["a", "b", "c"]
    assert all(found[name].tobytes() == arrays[name].tobytes() for name in arrays)


def test_a_folder_with_one_file_needs_no_index(tmp_path):
    with pytest.raises(UserError, match="holds no safetensors file"):
        open_safetensors(tmp_path)
    save_safetensors(tmp_path / "any.safetensors", {"x": np.ones(2)})
    assert list(open_safetensors(tmp_path)) == ["x"]
    save_safetensors(tmp_path / "other.safetensors", {"y": np.ones(2)})
    with pytest.raises(
        UserError, match=r"holds any\.safetensors, other\.safetensors, and no model\.safetensors\.index"
    ):
        open_safetensors(tmp_path)
    save_safetensors(tmp_path / "model.safetensors", {"z": np.ones(2)})
    assert list(open_safetensors(tmp_path)) == ["z"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, places: (folder / "model-2.safetensors").unlink(), r"names model-2\.safetensors, which is not"),
        (lambda folder, places: places.update(d="model-2.safetensors"), r"model-2\.safetensors holds no d, which"),
        (
            lambda folder, places: places.update(a="../model-1.safetensors"),
            "a is in '../model-1.safetensors', expected",
        ),
        (lambda folder, places: places.update(a="/etc/passwd"), "expected the name of a file beside it"),
        (lambda folder, places: places.update(a=".."), r"names \.\., which is not there"),
        (lambda folder, places: places.update(a=7), "a is in 7, expected"),
        (lambda folder, places: places.clear(), "has no weight_map"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, change, message):
    _, places = shards(tmp_path)
    change(tmp_path, places)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=message):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": []}', '{"weight_map": {"a": "x", "a": "y"}}'])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        open_safetensors(tmp_path)


BAD = {
    "empty": (lambda p: p.write_bytes(b""), "no safetensors file: 0 bytes"),
    "short": (lambda p: p.write_bytes(b"\0" * 7), "no safetensors file: 7 bytes"),
    "not ours": (
        lambda p: p.write_bytes(b"PK\3\4" + bytes(range(256))),
        "no safetensors file: a header of [0-9]+ bytes",
    ),
    "long header": (lambda p: write(p, {}, length=100_000_001), "at most 100000000 are allowed"),
    "beyond the file": (
        lambda p: write(p, {}, length=1000),
        "truncated, or no safetensors file: a header of 1000 bytes",
    ),
    "no JSON": (lambda p: write(p, b"{not"), "header is no JSON"),
    "no text": (lambda p: write(p, b"\xff\xfe{}"), "header is no JSON"),
    "deep": (lambda p: write(p, b"[" * 100_000), "header is no JSON"),
    "no object": (lambda p: write(p, []), "header is no JSON object"),
    "twice": (lambda p: write(p, b'{"x": 1, "x": 2}'), "a name is there twice"),
    "no entry": (lambda p: write(p, {"x": 7}), "no dtype, shape and data_offsets for x"),
    "no offsets": (lambda p: write(p, {"x": {"dtype": "F32", "shape": [2]}}), "no dtype, shape and data_offsets for x"),
    "negative": (lambda p: write(p, {"x": entry(shape=(-2,))}), "no dtype, shape and data_offsets for x"),
    "float": (lambda p: write(p, {"x": entry(shape=(2.0,))}, b"\0" * 8), "no dtype, shape and data_offsets for x"),
    "bool": (lambda p: write(p, {"x": entry("U8", (True,), (0, 1))}, b"\0"), "no dtype, shape and data_offsets for x"),
    "dtype": (lambda p: write(p, {"x": entry("F99")}, b"\0" * 8), r"x has dtype 'F99' \(known: F64, F32"),
    "dtype list": (lambda p: write(p, {"x": entry(["F32"])}, b"\0" * 8), "x has dtype"),
    "size": (lambda p: write(p, {"x": entry(shape=(3,))}, b"\0" * 8), r"x is F32\[3\], but its bytes are \[0, 8\]"),
    "huge": (lambda p: write(p, {"x": entry(shape=(2**62, 2**62))}), "but its bytes are"),
    "rank": (lambda p: write(p, {"x": entry("U8", (1,) * 40, (0, 1))}, b"\0"), "but its bytes are"),
    "backwards": (lambda p: write(p, {"x": entry(offsets=(8, 0))}, b"\0" * 8), "but its bytes are"),
    "overlap": (
        lambda p: write(p, {"x": entry(), "y": entry(offsets=(4, 12))}, b"\0" * 12),
        "bytes of y begin at 4, expected 8",
    ),
    "hole": (lambda p: write(p, {"x": entry(offsets=(4, 12))}, b"\0" * 12), "bytes of x begin at 4, expected 0"),
    "truncated": (lambda p: write(p, {"x": entry()}, b"\0" * 7), "is truncated: [0-9]+ bytes, its header says"),
    "more": (lambda p: write(p, {"x": entry()}, b"\0" * 9), "followed by bytes that its header does not know"),
    "missing": (lambda p: None, "there is no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_name(tmp_path, case):
    make, message = BAD[case]
    make(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        open_safetensors(tmp_path / "bad.safetensors")
    assert str(tmp_path / "bad.safetensors") in str(caught.value) and len(str(caught.value)) < 600


def test_what_the_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    for arrays in ({"x": np.ones(2, np.complex64)}, {"__metadata__": np.ones(2)}):
        with pytest.raises(UserError, match=r"a\.safetensors"):
            save_safetensors(tmp_path / "a.safetensors", arrays)
    assert os.listdir(tmp_path) == []


def test_a_save_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    save_safetensors(tmp_path / "a.safetensors", {"x": np.ones(2)})
    monkeypatch.setattr(os, "fsync", lambda fd: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_safetensors(tmp_path / "a.safetensors", {"x": np.zeros(2)})
    np.testing.assert_array_equal(open_safetensors(tmp_path / "a.safetensors")["x"], np.ones(2))
