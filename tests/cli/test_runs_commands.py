"""`jaxops runs`, `compare` and `ckpt` say what is there, in words and as JSON, with the status that is promised."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest
import yaml

from jaxops.cli.main import main
from jaxops.config.dump import digest
from jaxops.core.checkpoint import Checkpoints

CONFIG = {
    "model": {"kind": "sasrec", "dim": 4},
    "evaluate": {"metrics": ["ndcg@10"]},
    "checkpoint": {"best": "ndcg@10"},
    "run": {"name": "a", "steps": 30},
}
STEPS = {10: 0.5, 20: 0.75, 30: 0.25}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with three checkpoints, the second of them the best."""
    folder = tmp_path_factory.mktemp("saved") / "a"
    state = {
        "params": {"w": jnp.ones((3, 4)), "b": jnp.zeros((4,), jnp.bfloat16), "none": jnp.zeros((0, 2))},
        "opt_state": (jnp.arange(5), {"mu": jnp.ones((3, 4))}),
        "step": jnp.int32(7),
    }
    with Checkpoints(folder / "checkpoints", keep=3) as checkpoints:
        for step, value in STEPS.items():
            history = {"best": 0.75, "wall_s": 12.5}
            meta = {"cursor": step * 8, "seed": 3, "config": CONFIG, "history": history}
            checkpoints.save(step, state, meta, {"valid/ndcg@10": value})
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "a")


def lines(folder, name, logged, **summary):
    """A run folder without checkpoints."""
    place = folder / name
    place.mkdir(parents=True)
    config = {**CONFIG, "run": {"name": name, "steps": 30}, "model": {"kind": "sasrec", "dim": len(name)}}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    log = [{"v": 1, "step": s, "time": 1.7e9 + s, "train/loss": 3.0, "valid/ndcg@10": s / 100} for s in logged]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if summary:
        (place / "summary.json").write_text(json.dumps({"name": name, "finished": 1.7e9 + 100, **summary}))
    return place


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    results = {"test/ndcg@10": 0.25, "valid/ndcg@10": 0.3, "device": "1 x cpu"}
    lines(folder, "good", [10, 20, 30], state="finished", step=30, steps=30, wall_s=90.0, best_step=30, **results)
    lines(folder, "b[ad]", [10, 20], state="failed", reason="RunFailed: the loss is nan", step=10)
    lines(folder, "killed", [10])
    return folder


@pytest.fixture
def call(capsys):
    """Runs a command; gives its status, what it printed, and that as JSON where it was asked for."""

    def called(*words):
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, (json.loads(out) if "--json" in words and status != 2 else out), err

    return called


def test_runs_in_words(call, runs):
    status, out, err = call("runs", runs)
    assert (status, err) == (0, "")
    rows = {line.split()[0]: " ".join(line.split()) for line in out.splitlines()[1:4]}
    assert rows["good"].startswith("good finished 30/30 ndcg@10 0.3000 at 30 1 min 30 s 2023-11-14")
    assert rows["b[ad]"].startswith("b[ad] failed 20/30 ndcg@10 0.2000 at 20")
    assert rows["killed"].startswith("killed stopped 10/30")
    assert "b[ad]: failed at step 20: RunFailed: the loss is nan" in out and "killed: ended without a word" in out


def test_runs_as_json(call, runs):
    status, out, _ = call("runs", runs, "--json")
    found = {run["name"]: run for run in out["runs"]}
    assert status == 0 and set(found) == {"good", "b[ad]", "killed"}
    good = found["good"]
    assert (good["state"], good["best"], good["best_step"], good["wall_s"]) == ("finished", 0.3, 30, 90.0)
    assert good["path"] == str(runs / "good") and good["last_activity"] == "2023-11-14T22:15:00+00:00"


def test_an_empty_folder_of_runs_and_none_at_all(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call("runs")
    assert (status, out) == (2, "") and "there is no folder runs here" in err
    (tmp_path / "runs").mkdir()
    assert call("runs")[:2] == (0, "no runs in runs\n")
    assert call("runs", "--json")[1]["runs"] == []


def test_compare_prints_and_writes_beside_the_first_run(call, runs):
    status, out, _ = call("compare", runs / "good", runs / "killed", runs / "b[ad]")
    words = " ".join(out.split())
    assert status == 0
    for said in (
        "good 0.2500 0.3000",
        "killed (best so far, step 10) 0.1000",
        "b[ad] (best so far, step 20) 0.2000",
        "good finished 30/30 30 1 min 30 s 1 x cpu",
        "failed: RunFailed: the loss is nan 20/30",
        "model.dim 4 6 5",
        f"page: {runs / 'compare.html'}",
    ):
        assert said in words, said
    assert "run.name" not in words and "3 runs compared" in (runs / "compare.html").read_text()


def test_compare_as_json_writes_a_page_only_where_it_is_told_to(call, runs, tmp_path):
    status, out, _ = call("compare", "--json", runs / "good", runs / "killed")
    assert status == 0 and out["page"] is None and not (runs / "compare.html").exists()
    assert out["config"] == [{"path": "model.dim", "values": {"good": 4, "killed": 6}}]
    assert out["results"]["valid"]["best"] == {"ndcg@10": 0.3}
    assert [run["state"] for run in out["runs"]] == ["finished", "stopped"]
    for given, page in (("p.html", "p.html"), ("new/p.html", "new/p.html"), ("new", "new/compare.html")):
        _, out, _ = call("compare", "--json", runs / "good", runs / "killed", "--out", tmp_path / given)
        assert out["page"] == str(tmp_path / page) and (tmp_path / page).is_file()


def test_what_compare_refuses(call, runs):
    for words, message in (
        ([runs / "good"], "give 2 to 8 runs"),
        ([runs / "good"] * 9, "give 2 to 8 runs"),
        ([runs / "good", runs / "goood"], "did you mean 'good'?"),
        ([runs / "good", runs / "killed", "--out", "page.txt"], "ends in .html"),
    ):
        status, out, err = call("compare", *words)
        assert (status, out) == (2, "") and message in err
    assert not (runs / "compare.html").exists()


def test_ckpt_list(call, run):
    status, out, _ = call("ckpt", "list", run)
    rows = [line.split() for line in out.splitlines()[1:]]
    assert status == 0 and [row[0] for row in rows] == ["10", "20", "30"]
    assert [row[-1] for row in rows] == ["0.5000", "best", "latest"]
    found = call("ckpt", "list", run, "--json")[1]["checkpoints"]
    assert [one["metrics"]["valid/ndcg@10"] for one in found] == list(STEPS.values())
    assert all(one["bytes"] > 0 and one["damage"] == [] for one in found)


def test_ckpt_list_names_what_is_no_checkpoint(call, run):
    place = run / "checkpoints"
    shutil.copytree(place / "30", place / "30-2")
    (place / "40.orbax-checkpoint-tmp-1").mkdir()
    found = call("ckpt", "list", run, "--json")[1]
    assert [one["folder"] for one in found["checkpoints"]][2] == str(place / "30-2")
    assert {one["name"]: one["what"].split(":")[0] for one in found["others"]} == {
        "30": "an older save of a step",
        "40.orbax-checkpoint-tmp-1": "unfinished",
    }
    assert "30: an older save of a step\n40.orbax" in call("ckpt", "list", run)[1]


def test_ckpt_show(call, run):
    status, out, _ = call("ckpt", "show", run, "--step", 20, "--json")
    assert status == 0
    assert (out["step"], out["cursor"], out["seed"], out["wall_s"], out["best"], out["latest"]) == (
        *(20, 160, 3, 12.5),
        *(True, False),
    )
    assert out["config"] == CONFIG and out["config_sha256"] == digest(CONFIG)
    assert {leaf["path"]: (leaf["shape"], leaf["dtype"], leaf["bytes"]) for leaf in out["arrays"]} == {
        "params/w": ([3, 4], "float32", 48),
        "params/b": ([4], "bfloat16", 8),
        "params/none": ([0, 2], "float32", 0),
        "opt_state/0": ([5], "int32", 20),
        "opt_state/1/mu": ([3, 4], "float32", 48),
        "step": ([], "int32", 4),
    }
    groups = {group["name"]: (group["arrays"], group["entries"], group["bytes"]) for group in out["groups"]}
    assert groups == {"opt_state": (2, 17, 68), "params": (3, 16, 56), "step": (1, 1, 4)}
    assert out["total"] == {"name": "total", "arrays": 6, "entries": 34, "bytes": 128}


def test_ckpt_show_in_words_takes_the_one_saved_last(call, run):
    out = call("ckpt", "show", run)[1]
    words = " ".join(out.split())
    for said in (
        *("step 30 (latest)", "valid/ndcg@10 0.2500", "cursor 240 examples consumed", "seed 3"),
        *(f"SHA-256 {digest(CONFIG)}", "params/b [4] bfloat16 8", "total 6 34 128 128 B", "training 12.5 s"),
    ):
        assert said in words, said
    assert call("ckpt", "show", run / "checkpoints")[1] == out


def damage(folder, how):
    """Breaks one file of a checkpoint and gives its name."""
    arrays = max(
        (f for f in folder.rglob("*") if f.is_file()), key=lambda f: (f.name != "jaxops.json", f.stat().st_size)
    )
    file = folder / "jaxops.json" if how == "manifest" else arrays
    whole = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(whole[:-1])
    else:
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    return str(file.relative_to(folder))


@pytest.mark.parametrize(
    ("how", "said"),
    [("flipped", "CRC-32 differs"), ("truncated", "bytes, expected"), ("missing", "missing"), ("manifest", "")],
)
def test_ckpt_verify_names_the_damaged_file(call, run, how, said):
    assert call("ckpt", "verify", run)[0] == 0
    name = damage(run / "checkpoints" / "30", how)
    status, out, _ = call("ckpt", "verify", run)
    assert status == 1 and "step 10: good" in out and f"step 30: DAMAGED: {run / 'checkpoints' / '30'}" in out
    assert name in out and said in out and "1 of 3 damaged; a resume takes step 20" in out
    status, out, _ = call("ckpt", "verify", run, "--json")
    assert (status, out["damaged"]) == (1, 1)
    assert [bool(one["damage"]) for one in out["checkpoints"]] == [False, False, True]
    assert call("ckpt", "verify", run, "--step", 20)[0] == 0
    assert call("ckpt", "verify", run, "--step", 30)[0] == 1
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.latest_good(lambda _: None) == 20
    # The list looks at sizes alone; nothing of this deletes anything.
    marked = [one["step"] for one in call("ckpt", "list", run, "--json")[1]["checkpoints"] if one["damage"]]
    assert marked == ([] if how == "flipped" else [30])
    assert sorted(os.listdir(run / "checkpoints")) == ["10", "20", "30"]


def test_ckpt_verify_where_none_is_good(call, run):
    for step in STEPS:
        damage(run / "checkpoints" / str(step), "manifest")
    status, out, _ = call("ckpt", "verify", run)
    assert status == 1 and "3 of 3 damaged; there is none to resume from" in out
    status, _, err = call("ckpt", "show", run)
    assert status == 2 and "no checkpoint of" in err and "ckpt verify" in err


def test_ckpt_verify_says_what_was_never_checked(call, tmp_path):
    with Checkpoints(tmp_path / "checkpoints", checksums=False) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)}, {})
    status, out, _ = call("ckpt", "verify", tmp_path)
    assert status == 0 and "sizes are right" in out and "have no checksum" in out
    shown = call("ckpt", "show", tmp_path, "--json")[1]
    assert (shown["cursor"], shown["config_sha256"], shown["best"]) == (None, None, False)


def test_what_ckpt_refuses(call, run, tmp_path):
    (tmp_path / "bare").mkdir()
    for words, message in (
        (("show", run, "--step", 15), "no checkpoint of step 15"),
        (("verify", run, "--step", 15), "there are steps 10, 20, 30"),
        (("verify", tmp_path / "bare"), "has no checkpoint to verify"),
        (("show", tmp_path / "bare"), "has no checkpoint yet"),
        (("list", tmp_path / "bar"), "did you mean 'bare'?"),
        (("lst", run), "did you mean 'list'?"),
    ):
        status, out, err = call("ckpt", *words)
        assert (status, out) == (2, "") and message in err and "Traceback" not in err
    assert call("ckpt", "list", tmp_path / "bare")[:2] == (0, f"{tmp_path / 'bare'} has no checkpoint yet\n")


def test_looking_at_runs_loads_no_jax_and_at_checkpoints_no_device(run):
    code = f"""if True:
        import sys
        from jaxops.cli.main import main
        assert main(["runs", {str(run.parent)!r}]) == 0
        assert main(["compare", {str(run)!r}, {str(run.parent / "b")!r}, "--json"]) == 0
        assert not {{"jax", "matplotlib"}} & set(sys.modules), "loaded"
        for action in ("list", "show", "verify"):
            assert main(["ckpt", action, {str(run)!r}]) == 0
        assert main(["ckpt", "export", {str(run)!r}, {str(run.parent / "copy")!r}]) == 0
        assert "orbax" not in sys.modules
    """
    lines(run.parent, "b", [10])
    # Any device that were asked for would be an error.
    env = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
