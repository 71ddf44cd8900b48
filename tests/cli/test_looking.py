"""Commands that only look: config, shardings, data, doctor. What a person sees, and what a program reads."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxops.cli.main import main
from jaxops.core.mesh import make_mesh
from jaxops.data import sources
from jaxops.run.build import build_task, load_config


def said(capsys, *argv: str) -> str:
    assert main(list(argv)) == 0
    told = capsys.readouterr()
    assert told.err == ""
    return told.out


def read(capsys, *argv: str):
    return json.loads(said(capsys, *argv, "--json"))


def cells(text: str) -> dict[str, list[str]]:
    """First cell of each line and the others; cells are apart by two spaces or more."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_config_shows_every_value_and_where_it_comes_from(folder, capsys):
    rows = cells(said(capsys, "config", "my.yaml", "model.dim=16", "optimizer.frozen=[norm]"))
    assert rows["model.dim"] == ["16", "# override 'model.dim=16'"]
    assert rows["model.length"] == ["6", "# my.yaml:3"]
    assert rows["model.dropout"] == ["0.2", "# configs/rec/sasrec.yaml:3"]
    assert rows["optimizer.weight_decay"] == ["0.0", "# default"]
    assert rows["optimizer.frozen"] == ["[norm]", "# override 'optimizer.frozen=[norm]'"]
    assert rows["optimizer.no_decay"] == ["[bias$, scale$]", "# default"]
    assert rows["checkpoint.keep_every"] == ["null", "# default"]
    assert rows["evaluate.metrics"] == ["[hr@10, ndcg@10, mrr@10]", "# configs/rec/sasrec.yaml:8"]


def test_config_as_json_is_the_resolved_one(folder, capsys):
    found = read(capsys, "config", "my.yaml", "model.dim=16")
    assert found == load_config("my.yaml", ["model.dim=16"]).resolved
    assert found["batch"] == {"global": 16, "microbatch": "auto", "pack": False}


def test_config_diff_of_files_and_of_run_folders(finished, capsys):
    Path("wide.yaml").write_text("base: my.yaml\nmodel: {dim: 32}\nrun: {seed: 3}\nevaluate: {stop: {patience: 2}}\n")
    out = said(capsys, "config", "--diff", "my.yaml", "wide.yaml")
    rows = cells(out)
    assert rows["model.dim"] == ["8", "->", "32"] and rows["run.seed"] == ["0", "->", "3"]
    assert rows["evaluate.stop.patience"] == ["(absent)", "->", "2"] and "None" not in out
    assert read(capsys, "config", "--diff", "my.yaml", "wide.yaml")[0] == {"path": "model.dim", "a": 8, "b": 32}
    assert said(capsys, "config", "--diff", "my.yaml", "my.yaml") == "no difference\n"
    assert read(capsys, "config", "--diff", "my.yaml", "my.yaml") == []
    rows = cells(said(capsys, "config", "--diff", "runs/tiny", "wide.yaml"))
    assert rows["model.dim"] == ["8", "->", "32"]


@pytest.mark.latest
def test_shardings_has_every_parameter_and_its_bytes(folder, capsys):
    argv = ["shardings", "my.yaml", "mesh={data: 2, fsdp: 2, tensor: 2}"]
    out = said(capsys, *argv)
    rows = cells(out)
    task = build_task(load_config("my.yaml"))
    leaves = jax.tree_util.tree_leaves_with_path(task.model.shapes)
    paths = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}
    assert paths.keys() < rows.keys() and "…" not in out
    assert out.splitlines()[0].startswith("8 x cpu, jax") and "data 2 x fsdp 2 x tensor 2" in out.splitlines()[0]
    assert rows["item/embedding"][:3] == ["128 x 8", "tensor, fsdp", "1,024"]
    assert rows["item/embedding"][3] == f"{128 - task.model.n_items} of 128 rows are padding"
    assert rows["position/embedding"] == ["6 x 8", "-, fsdp", "96"]
    assert rows["norm/scale"] == ["8", "replicated", "32"]
    assert rows["total"][0] == f"{sum(int(np.prod(leaf.shape)) for leaf in paths.values()):,}"
    found = read(capsys, *argv)
    assert found["mesh"] == {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    by_path = {row["path"]: row for row in found["parameters"]}
    assert by_path.keys() == paths.keys()
    assert by_path["item/embedding"]["spec"] == ["tensor", "fsdp"]
    total = sum(row["bytes_per_device"] for row in found["parameters"])
    assert rows["total"][1] == f"{total:,}"
    # and it is so: the arrays that training makes hold that many bytes on a device
    from jaxops.run.training import build_training

    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        params = build_training(task, mesh)[1]().params
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert held == total


def test_shardings_says_which_axes_were_dropped(folder, capsys):
    rows = cells(said(capsys, "shardings", "my.yaml", "mesh={data: 1, fsdp: 8}", "model={dim: 12}"))
    assert rows["position/embedding"] == ["6 x 12", "replicated", "288", "fsdp does not divide 12"]
    assert rows["block_0/mlp/up/kernel"] == ["12 x 48", "replicated", "2,304", "fsdp does not divide 12"]


OWN_SCORES = """
def bare(model):
    def objective(params, batch, key):
        scores = jnp.einsum("bld,vd->blv", model.encode(params, batch, key), params["item"]["embedding"])
        logp = jnp.take_along_axis(jax.nn.log_softmax(scores), batch["targets"][..., None], axis=-1)[..., 0]
        return {"loss/own": jx.Sum.of(-logp, batch["weight"])}
    return objective
"""


@pytest.mark.latest
def test_a_kernel_that_is_multiplied_as_it_lies_over_fsdp_is_refused(folder, capsys):
    """By `shardings`, after the table, and by `train`, before anything is written."""
    losses = Path("ownpkg/losses.py")
    losses.write_text(losses.read_text() + OWN_SCORES)
    own = ["my.yaml", "objective={fn: ownpkg.losses:bare}"]
    assert main(["shardings", *own, "mesh={data: 2, fsdp: 2, tensor: 2}"]) == 2
    told = capsys.readouterr()
    assert cells(told.out)["item/embedding"][:2] == ["128 x 8", "tensor, fsdp"]
    assert "  item/embedding (tensor, fsdp) reaches dot_general at " in told.err and "losses.py:" in told.err
    assert 'jaxops.constrain(kernel, ("embed", "mlp"))' in told.err and "Traceback" not in told.err
    assert main(["shardings", *own, "mesh={data: 2, fsdp: 4}", "--json"]) == 2
    (bare,) = json.loads(capsys.readouterr().out)["unconstrained_kernels"]
    assert bare["path"] == "item/embedding" and bare["product"] == "dot_general" and "losses.py:" in bare["where"]
    assert read(capsys, "shardings", *own, "mesh={data: 8}")["unconstrained_kernels"] == []
    assert main(["train", *own, "mesh={data: 2, fsdp: 4}"]) == 2
    assert "item/embedding (-, fsdp) reaches dot_general" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_data_list_and_get(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path))
    out = said(capsys, "data", "list")
    assert re.search(r"movielens_100k +MovieLens-100K", out) and "research use" in out
    assert "not fetched yet: jaxops data get movielens_100k" in out
    assert read(capsys, "data", "list")[0]["path"] is None
    named = sources.find_source("movielens_100k")
    content = b"1\t2\t3\t4\n"
    changed = sources.dataclasses.replace(named, sha256=sources.hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(sources.SOURCES, "movielens_100k", changed)
    named.path.parent.mkdir(parents=True)
    named.path.write_bytes(content)
    found = read(capsys, "data", "get", "movielens_100k")
    assert found["path"] == str(named.path) and "research use" in found["licence"]
    assert said(capsys, "data", "get", "movielens_100k").splitlines() == [
        named.title,
        named.licence,
        str(named.path),
    ]
    assert str(named.path) in said(capsys, "data", "list")


def test_data_inspect_says_what_there_is(folder, capsys):
    rows = cells(said(capsys, "data", "inspect", "my.yaml", "data.min_count.item=2"))
    assert rows["users"] == ["60 (string ids)"] and rows["items"] == ["30 (string ids)"]
    assert rows["validation"][0].startswith("60 queries") and rows["split"] == ["leave_one_out"]
    assert rows["time"][0].startswith("2023-11-14T22:13:20Z to ")
    found = read(capsys, "data", "inspect", "my.yaml")
    assert found["split"]["sha256"] == rows["split SHA-256"][0] and found["users"] == 60
    assert sum(found["lengths"]["histogram"]["counts"]) == 60


def test_data_build_makes_the_cache_that_training_reads(folder, capsys):
    out = said(capsys, "data", "build", "my.yaml", "data.cache=lake")
    cache = Path(out.removeprefix("built: ").strip())
    assert cache.parent == Path("lake") and (cache / "manifest.json").is_file()
    before = (cache / "manifest.json").stat().st_mtime_ns
    assert read(capsys, "data", "build", "my.yaml", "data.cache=lake") == {"cache": str(cache)}
    rows = cells(said(capsys, "data", "inspect", "my.yaml", "data.cache=lake"))
    assert rows["cache"] == [str(cache)]
    assert (cache / "manifest.json").stat().st_mtime_ns == before  # read, not built again
    assert rows["split SHA-256"] == cells(said(capsys, "data", "inspect", "my.yaml"))["split SHA-256"]


@pytest.mark.latest
def test_doctor_tells_facts_and_problems(capsys, monkeypatch, tmp_path):
    rows = cells(said(capsys, "doctor"))
    assert rows["jax"] == [jax.__version__] and rows["backend"] == ["8 x cpu (cpu)"]
    found = read(capsys, "doctor")
    assert found["facts"]["data cache"] == rows["data cache"][0]
    assert found["problems"] == [] or "disk" in found["problems"][0]
    monkeypatch.setattr("jaxops.cli.doctor.accelerators", lambda: ["TPU"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "file"))
    problems = read(capsys, "doctor")["problems"]
    assert any("TPU is here, but jax runs on the CPU: run make install ACCEL=tpu" in what for what in problems)
    assert any("set JAXOPS_CACHE" in what for what in problems)
    out = said(capsys, "doctor")
    assert "! TPU is here" in out and "nothing is wrong" not in out


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["data", "inspect", "--help"]])
def test_help_says_the_exit_statuses(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: jaxops" in text
    if "data" not in argv:
        assert "75 interrupted and saved" in text and "2 wrong input" in text


def test_a_reader_that_went_away_is_no_error(folder, monkeypatch):
    def gone(*args):
        raise BrokenPipeError

    monkeypatch.setattr("jaxops.cli.commands.config", gone)
    monkeypatch.setattr("jaxops.cli.main.os.dup2", lambda *args: None)
    assert main(["config", "my.yaml"]) == 0


def test_a_stop_before_there_is_anything_to_save_is_no_traceback(folder, monkeypatch, capsys):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxops.cli.commands.load_config", stopped)
    assert main(["train", "my.yaml"]) == 130
    assert capsys.readouterr().err == "jaxops: stopped\n"
