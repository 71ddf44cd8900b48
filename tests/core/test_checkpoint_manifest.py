"""The manifest: written whole, believed only when unchanged, and able to name the file that is wrong."""

import json
import os

import pytest
from etils import epath

from jaxops.core import manifest
from jaxops.core.manifest import Damaged, File, Manifest, SavedArray

ARRAYS = {("params", "layers", 0, "w"): ((2, 3), "bfloat16"), ("step",): ((), "int32")}


def example(**changes):
    values = {"step": 20, "serial": 2, "meta": {"cursor": 5, "nested": {"x": [1, 2.5, None]}}}
    return Manifest(**values | {"metrics": {"valid/ndcg@10": 0.125}, "arrays": ARRAYS} | changes)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "abc").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "top").write_text("x")
    return epath.Path(tmp_path)


def test_it_comes_back_as_written(folder):
    files = manifest.survey(folder, checksums=True)
    manifest.write(folder, example(files=files))
    assert manifest.read(folder) == example(files=files)
    assert manifest.read(folder).format == 1


def test_it_is_plain_json(folder):
    manifest.write(folder, example())
    body = json.loads((folder / "jaxops.json").read_text())["manifest"]
    assert body["meta"]["cursor"] == 5
    assert body["arrays"][0] == {"path": ["params", "layers", 0, "w"], "shape": [2, 3], "dtype": "bfloat16"}


def test_nothing_is_left_beside_it(folder):
    manifest.write(folder, example())
    manifest.write(folder, example(step=21))
    assert sorted(os.listdir(folder)) == ["jaxops.json", "state", "top"]
    assert manifest.read(folder).step == 21


def test_leaves_have_their_bytes():
    assert example().leaves() == [
        SavedArray("params/layers/0/w", (2, 3), "bfloat16", 12),
        SavedArray("step", (), "int32", 4),
    ]


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": {1, 2}}, {"x": object()}])
def test_what_is_not_json_is_refused(meta):
    with pytest.raises((TypeError, ValueError)):
        manifest.to_json(example(meta=meta))


def test_survey_lists_every_file_but_itself(folder):
    manifest.write(folder, example())
    sizes = manifest.survey(folder, checksums=False)
    assert sizes == {"state/d/abc": File(25600, None), "top": File(1, None)}
    assert manifest.survey(folder, checksums=True)["top"] == File(1, 0x8CDC1683)  # CRC-32 of b"x"


def test_a_missing_manifest(folder):
    with pytest.raises(Damaged, match=r"jaxops\.json cannot be read \(FileNotFoundError"):
        manifest.read(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"crc32": 1}', '{"manifest": {}}', "\x00\xff"])
def test_garbage_is_damaged(folder, text):
    (folder / "jaxops.json").write_text(text)
    with pytest.raises(Damaged, match="cannot be read"):
        manifest.read(folder)


def test_bytes_that_are_not_text_are_damaged(folder):
    (folder / "jaxops.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Damaged):
        manifest.read(folder)


def test_every_changed_digit_is_seen(folder):
    manifest.write(folder, example(files=manifest.survey(folder, checksums=True)))
    text = (folder / "jaxops.json").read_text()
    digits = [i for i, c in enumerate(text) if c.isdigit()]
    assert len(digits) > 30
    for i in digits:
        (folder / "jaxops.json").write_text(text[:i] + ("1" if text[i] == "2" else "2") + text[i + 1 :])
        with pytest.raises(Damaged):
            manifest.read(folder)


def test_a_newer_format_is_said_to_be_one(folder, monkeypatch):
    monkeypatch.setattr(Manifest, "format", 99)
    manifest.write(folder, example())
    with pytest.raises(Damaged, match="format 99, written by a newer jaxops; this one reads 2"):
        manifest.read(folder)


def test_problems_name_the_file(folder):
    saved = example(files=manifest.survey(folder, checksums=True))
    check = lambda checksums=True: list(manifest.problems(folder, saved, checksums=checksums))
    assert check() == []

    data = folder / "state" / "d" / "abc"
    whole = data.read_bytes()
    flipped = bytearray(whole)
    flipped[12345] ^= 0x10
    data.write_bytes(bytes(flipped))
    assert check() == ["state/d/abc: contents were changed (CRC-32 differs)"]
    assert check(checksums=False) == []

    data.write_bytes(whole[:-1])
    assert check() == check(checksums=False) == ["state/d/abc: 25599 bytes, expected 25600"]

    data.unlink()
    assert check(checksums=False) == ["state/d/abc: missing"]

    data.write_bytes(whole)
    (folder / "new").write_text("a file that was not there is no harm")
    assert check() == []


def test_without_checksums_only_sizes_are_compared(folder):
    saved = example(files=manifest.survey(folder, checksums=False))
    (folder / "top").write_text("y")
    assert list(manifest.problems(folder, saved, checksums=True)) == []


def test_differences():
    wanted = {
        ("params", "layers", 0, "w"): ((2, 4), "bfloat16"),
        ("params", "layers", 1, "w"): ((2, 4), "bfloat16"),
    }
    assert list(manifest.differences(example(), wanted)) == [
        ("params/layers/0/w", "shape [2, 3] in the checkpoint, [2, 4] expected"),
        ("params/layers/1/w", "not in the checkpoint, bfloat16[2, 4] expected"),
        ("step", "int32[] in the checkpoint, not expected"),
    ]
    dtypes = ARRAYS | {("step",): ((), "float32")}
    assert list(manifest.differences(example(), dtypes)) == [("step", "int32 in the checkpoint, float32 expected")]
    # A list and a dict with integer keys are the same thing once stored.
    strings = {("params", "layers", "0", "w"): ((2, 3), "bfloat16"), ("step",): ((), "int32")}
    assert list(manifest.differences(example(), strings)) == []
