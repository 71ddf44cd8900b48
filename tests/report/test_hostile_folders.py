"""A run folder of somebody else, however it was made, stops no command, fills no memory and moves no cursor."""

import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from etils import epath
from tiny_runs import finished, folder, no_report  # noqa: F401 (fixtures)

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core import manifest, small_files
from jaxops.core.failures import UserError
from jaxops.core.manifest import Damaged
from jaxops.run.folder.listing import list_runs

GOOD = {"v": 1, "step": 3, "time": 1.0, "train/loss": 0.5}


def good(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"run": {"steps": 4}, "evaluate": {"metrics": ["hr@10"]}}))
    (path / "metrics.jsonl").write_text(json.dumps(GOOD) + "\n")
    return path


def bomb() -> str:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]")
    return "\n".join(lines)


def with_pipes(path):
    for name in ("config.yaml", "summary.json", "metrics.jsonl", ".lock", ".lease.json", "about.json", "data.json"):
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)


def without_end(path):
    for name in ("config.yaml", "summary.json", "metrics.jsonl", "about.json"):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to("/dev/zero")


def huge(path):
    for name in ("config.yaml", "summary.json", "metrics.jsonl"):
        with open(path / name, "ab") as file:
            file.truncate(1 << 40)  # nothing on the disk


def deep(path):
    (path / "summary.json").write_text("[" * 200_000)
    (path / "config.yaml").write_text("a: " + "[" * 200_000)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"v":1,"step":4,"x":' + "[" * 200_000 + "\n")


def aliases(path):
    (path / "config.yaml").write_text(bomb())


def odd(path):
    (path / "summary.json").write_text(json.dumps({"state": ["x"], "step": {"a": 1}, "steps": "many", "wall_s": []}))
    (path / "about.json").write_text('{"metrics": 3, "note": [1]}')
    (path / ".lease.json").write_text('{"time": 1e999, "pid": 1e9}')
    (path / "metrics.jsonl").write_text(f'{{"v":1,"step":{10**400}}}\n{{"v":1,"step":5,"time":1e308,"event":[]}}\n')


@pytest.mark.parametrize("harm", [with_pipes, without_end, huge, deep, aliases, odd])
def test_the_listing_goes_on(tmp_path, harm):
    good(tmp_path / "runs" / "good")
    harm(good(tmp_path / "runs" / "bad"))
    code = "import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
    code += "from jaxops.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "runs", str(tmp_path / "runs"), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = {run["name"]: run for run in json.loads(done.stdout)["runs"]}
    assert found["good"]["step"] == 3 and "bad" in found and time.monotonic() - began < 60
    if harm is not odd:
        assert found["bad"]["problems"]


def test_nothing_in_a_folder_is_obeyed_by_a_terminal(tmp_path, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\x1b[31m\u202e"
    path = good(tmp_path / "runs" / f"bad{evil}name")
    summary = {"state": f"failed{evil}", "reason": f"see {evil}here", "step": 3, f"valid/hr@10{evil}": 0.5}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "about.json").write_text(json.dumps({"labels": {"a": evil}, "note": evil}))
    config = {"run": {"name": f"x{evil}"}, "checkpoint": {"best": f"hr{evil}"}, "data": {"path": evil}}
    (path / "config.yaml").write_text(yaml.dump(config, allow_unicode=True))
    good(tmp_path / "runs" / "good")
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert main(["compare", str(path), str(tmp_path / "runs" / "good"), "--out", str(tmp_path)]) == 0
    assert main(["ckpt", "list", str(path)]) == 0
    assert main(["evaluate", str(path)]) == 2
    assert main(["config", "--diff", str(path), str(tmp_path / "runs" / "good")]) == 0
    out = capsys.readouterr()
    for text in (out.out, out.err):
        assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "badname" in out.out and "see here" in out.out


def body(**changes):
    found = {
        "format": 1, "step": 1, "serial": 1, "meta": {}, "metrics": {"a": 0.5},
        "arrays": [{"path": ["params", "w"], "shape": [2], "dtype": "float32"}],
        "files": {"state/d/x": {"bytes": 3, "crc32": None}},
    }  # fmt: skip
    return found | changes


def write(folder, content):  # noqa: F811
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    (folder / "jaxops.json").write_text(json.dumps({"crc32": zlib.crc32(text), "manifest": content}))


ARRAY = {"path": ["params", "w"], "shape": [2], "dtype": "float32"}
ARRAYS = [{"path": "w"}, {"path": [{}]}, {"path": [-1]}, {"shape": 3}, {"shape": [-1]}, {"shape": [2.0]}]
ARRAYS += [{"shape": [True]}, {"shape": [2**40, 2**40]}, {"shape": [1] * 100}]
ARRAYS += [{"dtype": dtype} for dtype in ("O", "S999999999", 3, "float7", "V8")]
NAMES = ["../x", "/etc/passwd", "a/../../b", "", "a\0b", "."]
FILES = [3, {}, {"bytes": -1, "crc32": None}, {"bytes": 1, "crc32": "x"}, {"bytes": 1, "crc32": None, "more": 1}]
HOSTILE = [
    *[7, [], None, "x", {}],
    *[body(**{name: value}) for name in body() if name != "meta" for value in (None, "x", -1, [1], {"a": "b"})],
    *[body(meta=value) for value in (None, "x", -1, [1])],
    *[body(format=True), body(step=1.5), body(step=2**70), body(metrics={"a": None}), body(metrics={"a": True})],
    *[body(arrays=[ARRAY | change]) for change in ARRAYS],
    *[body(arrays=[ARRAY, ARRAY]), body(arrays=[{}])],
    *[body(files={name: {"bytes": 3, "crc32": None}}) for name in NAMES],
    *[body(files={"x": file}) for file in FILES],
    *[body(shared=3), body(shared={"frozen": 3}), body(shared={"frozen": "../../x"})],
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_manifest_is_damaged(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(Damaged):
        manifest.read(epath.Path(tmp_path))


def test_what_holds_is_read(tmp_path):
    write(tmp_path, body())
    assert manifest.read(epath.Path(tmp_path)).step == 1


@pytest.mark.parametrize("harm", ["pipe", "deep", "endless"])
def test_a_manifest_that_cannot_be_read_is_damaged(tmp_path, harm):
    file = tmp_path / "jaxops.json"
    if harm == "pipe":
        os.mkfifo(file)
    elif harm == "deep":
        file.write_text("[" * 200_000)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(Damaged):
        manifest.read(epath.Path(tmp_path))


def edit(run: str, change) -> Path:
    """The manifests of a run's checkpoints changed, with checksums that fit again."""
    for file in Path(run, "checkpoints").glob("*/jaxops.json"):
        content = json.loads(file.read_text())["manifest"]
        change(content)
        write(file.parent, content)
    return Path(run)


def inflate(name: str, shape: list[int]):
    def change(content):
        first = next(a for a in content["arrays"] if a["path"][0] == name and len(a["shape"]) == 2)
        first["shape"] = shape

    return change


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_a_checkpoint_that_asks_for_more_than_its_model_is_refused_unread(finished, capsys, command):  # noqa: F811
    edit("runs/tiny", inflate("params", [1 << 40, 8]))
    rest = {"predict": ["plays.csv", "--out", "p.parquet"], "export": ["v.parquet"]}.get(command, [])
    assert main([command, "runs/tiny", *rest]) == 2
    said = capsys.readouterr().err
    assert "is not of the model that its config describes" in said and str(1 << 40) in said


def test_a_checkpoint_with_more_parameters_than_its_model_is_refused(finished):  # noqa: F811
    def add(content):
        content["arrays"].append({"path": ["params", "more"], "shape": [1 << 40], "dtype": "float32"})

    edit("runs/tiny", add)
    with pytest.raises(UserError, match="more: the model has no such parameter"):
        jx.load("runs/tiny").evaluate()


def test_a_file_of_a_checkpoint_that_is_a_pipe_is_damage(finished, capsys):  # noqa: F811
    files = [path for path in Path("runs/tiny/checkpoints").rglob("*") if path.is_file()]
    state = next(path for path in files if path.parent.name == "d")
    state.unlink()
    os.mkfifo(state)
    assert main(["ckpt", "verify", "runs/tiny"]) == 1
    assert "no ordinary file" in capsys.readouterr().out
    step = state.relative_to("runs/tiny/checkpoints").parts[0]
    assert main(["ckpt", "export", "runs/tiny", "copy", "--step", step]) == 2
    assert "no ordinary file" in capsys.readouterr().err


def test_an_array_that_is_unpacked_to_more_than_it_is_is_refused(tmp_path):
    import jax
    import tensorstore as ts

    from jaxops.core.read_arrays import read_arrays

    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/"}, "path": "w/"}
    grid = {"name": "regular", "configuration": {"chunk_shape": [1 << 20]}}
    meta = {"shape": [4], "chunk_grid": grid, "data_type": "float32", "fill_value": 0.5}
    ts.open({"driver": "zarr3", "kvstore": base, "metadata": meta, "create": True}).result()
    with pytest.raises(ValueError, match="larger than itself"):
        read_arrays(epath.Path(tmp_path), {"w": jax.ShapeDtypeStruct((4,), np.float32)})


def test_small_files_are_ordinary_and_small(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert small_files.read_bytes(file, 5) == b"12345" and small_files.read_text(file) == "12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        small_files.read_bytes(file, 4)
    with pytest.raises(IsADirectoryError):
        small_files.read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        small_files.read_bytes(tmp_path / "b")
    assert list_runs(tmp_path) == []
