"""`jaxops audit`: tiny configs of each family pass on eight devices, and what is planted by import path is found."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxops as jx
from jaxops.audit.audit import Report, devices_needed, shrunk
from jaxops.audit.finding import Finding
from jaxops.audit.updates import MICROBATCHES, audited_rows
from jaxops.cli.main import main
from jaxops.core.mesh import MeshConfig

TOY = "task: {task}\nbatch: {{global: 16}}\nmesh: {{data: {data}}}\nrun: {{name: toy, steps: 2}}\n"


@pytest.fixture(autouse=True)
def _own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))


def verdicts(capsys, *argv):
    """The exit status, the verdict of each check and the reason of each."""
    status = main(["audit", *argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    by_check = {one["check"]: one for one in found["findings"]}
    return status, {name: one["verdict"] for name, one in by_check.items()}, by_check


def test_what_is_found_is_printed_and_is_the_status(capsys, monkeypatch):
    found = [Finding("sums", "failed", "a mean", 0.5, 1e-4), Finding.skipped("keys", "nothing is drawn")]
    report = Report({"data": 2}, {"data": 2}, "2 x cpu", 16, found, ["fresh"])
    Path("my.yaml").write_text(TOY.format(task="toy_family:FAMILY", data=2))
    monkeypatch.setattr("jaxops.audit.audit.audit", lambda task, **options: report)
    assert main(["audit", "my.yaml"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "compiled for data 2; ran on data 2 (2 x cpu), batches of 16",
        "note: fresh",
        "FAILED  sums           a mean (0.5, at most 0.0001)",
        "-       keys           nothing is drawn",
        "0 passed, 1 failed, 1 not applicable",
    ]
    monkeypatch.setattr("jaxops.audit.audit.audit", lambda task, **options: dataclasses.replace(report, findings=[]))
    assert main(["audit", "my.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"] == {"data": 2}


@pytest.mark.slow
def test_what_a_user_raises_is_a_finding(capsys):
    """Its second program does not know how its result should lie on two devices."""
    Path("my.yaml").write_text(TOY.format(task="toy_family:FAMILY", data=2))
    status, found, by_check = verdicts(capsys, "my.yaml")
    assert status == 1 and [name for name, verdict in found.items() if verdict == "failed"] == ["programs"]
    assert "ShardingTypeError" in by_check["programs"]["why"] and found["one device"] == "passed"


@pytest.mark.slow
def test_a_family_of_ones_own_with_a_step_of_several_programs(capsys, monkeypatch):
    import toy_policy

    draw = np.random.default_rng(0)

    def drawn(size):
        """An update's batch with values, where the toy's own has zeros."""
        fill = lambda x: draw.normal(size=x.shape).astype(x.dtype) if x.dtype == np.float32 else x
        whole = jax.tree.map(fill, toy_policy.ready_batch(size))
        return whole | {"tokens": draw.integers(0, toy_policy.LETTERS, whole["tokens"].shape).astype(np.int32)}

    build = lambda loaded, given: dataclasses.replace(toy_policy.build(loaded, given), update_batch=drawn)
    monkeypatch.setattr(toy_policy, "FAMILY", dataclasses.replace(toy_policy.FAMILY, build=build))
    Path("my.yaml").write_text(TOY.format(task="toy_policy:FAMILY", data=2).replace("global: 16", "global: 32"))
    status, found, by_check = verdicts(capsys, "my.yaml")
    assert status == 0 and "failed" not in found.values()
    assert {name for name, verdict in found.items() if verdict == "not applicable"} == {
        "fence",
        "replicated",
        "keys",
        "packing",
    }
    assert by_check["host"]["why"] == "no callback in 3 program(s)"
    assert by_check["one device"]["measured"]["gradient"] <= 1e-6
    assert by_check["recompiles"]["measured"] == 0


def test_wrong_input_is_status_2_and_a_line(capsys):
    Path("my.yaml").write_text(TOY.format(task="toy_family:FAMILY", data=3))
    assert main(["audit", "my.yaml"]) == 2
    assert "16 is no multiple of the mesh's batch shards" in capsys.readouterr().err
    assert main(["audit", "my.yaml", "mesh.data=2", "mesh.tensor=100000"]) == 2
    assert "200000 devices" in capsys.readouterr().err
    assert (
        main(["audit", "language/sft", "data={kind: text, path: none.jsonl, length: 8}", "run={name: x, steps: 1}"])
        == 2
    )
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "at_hand", "needed", "ran_on"),
    [
        (MeshConfig(data=-1), 8, 8, {"data": 8}),
        (MeshConfig(data=2), 8, 2, {"data": 2}),
        (MeshConfig(fsdp=64), 8, 64, {"fsdp": 8}),
        (MeshConfig(data=16, fsdp=4), 8, 64, {"data": 2, "fsdp": 4}),
        (MeshConfig(data=-1, tensor=16), 8, 16, {"tensor": 8}),
        (MeshConfig(), 8, 1, {}),
        (MeshConfig(data=3, fsdp=-1), 8, 6, {"data": 3, "fsdp": 2}),
    ],
)
def test_a_mesh_that_is_too_large_is_compiled_and_a_smaller_one_runs(mesh, at_hand, needed, ran_on):
    assert devices_needed(mesh, at_hand) == needed
    assert shrunk(mesh.sizes(needed), at_hand) == ran_on


@pytest.mark.parametrize(
    ("shards", "block", "most", "rows"), [(8, 1, 256, 16), (1, 1, 256, 8), (4, 64, 64, 64), (2, 3, 48, 12)]
)
def test_the_batch_has_an_example_for_each_microbatch_of_each_device(shards, block, most, rows):
    class Task:
        pass

    Task.block = block
    assert audited_rows(Task, shards, most) == rows and rows % shards == 0 and rows % block == 0
    assert MICROBATCHES == 2


PLANTED = '''
import jax, jax.numpy as jnp, numpy as np
import jaxops as jx

def nll(model, params, batch, key, dtype=None):
    logits = model.apply(params, batch, key)
    logits = logits if dtype is None else logits.astype(dtype)
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logp, batch["targets"][..., None], axis=-1)[..., 0]

def of(loss):
    """A factory as the config names it, of a loss (model, params, batch, key) -> Sums."""
    return lambda model: lambda params, batch, key: loss(model, params, batch, key)

@of
def right(model, params, batch, key):
    return {"loss/nll": jx.Sum.of(nll(model, params, batch, key), batch["weight"])}

@of
def mean(model, params, batch, key):
    one = jx.Sum.of(nll(model, params, batch, key), batch["weight"])
    return {"loss/nll": jx.Sum(one.total / one.count, jnp.ones(()))}

@of
def confident(model, params, batch, key):
    loss = nll(model, params, batch, key)
    return {"loss/nll": jx.Sum.of(loss, batch["weight"] * (loss < 3.4))}

@of
def coupled(model, params, batch, key):
    loss = nll(model, params, batch, key)
    return {"loss/nll": jx.Sum.of(loss * jax.nn.softmax(loss, axis=0), batch["weight"])}

@of
def by_place(model, params, batch, key):
    loss = nll(model, params, batch, key)
    noise = 1.0 if key is None else jax.random.uniform(key, loss.shape)
    return {"loss/nll": jx.Sum.of(loss * noise, batch["weight"])}

@of
def shared(model, params, batch, key):
    loss = nll(model, params, batch, None)
    noise = jnp.ones((1, loss.shape[1])) if key is None else jax.random.uniform(key, (1, loss.shape[1]))
    return {"loss/nll": jx.Sum.of(loss * noise, batch["weight"])}

@of
def deaf(model, params, batch, key):
    return {"loss/nll": jx.Sum.of(nll(model, jax.lax.stop_gradient(params), batch, key), batch["weight"])}

@of
def rooted(model, params, batch, key):
    loss = nll(model, params, batch, key)
    return {"loss/nll": jx.Sum.of(loss + jnp.sqrt(loss - loss), batch["weight"])}

@of
def asking(model, params, batch, key):
    weight = jax.pure_callback(lambda w: np.asarray(w), batch["weight"], batch["weight"])
    return {"loss/nll": jx.Sum.of(nll(model, params, batch, key), weight)}

TABLE = np.random.default_rng(0).normal(size=(2**19,)).astype(np.float32)

@of
def closing(model, params, batch, key):
    loss = nll(model, params, batch, key) + jnp.asarray(TABLE)[batch["targets"]]
    return {"loss/nll": jx.Sum.of(loss, batch["weight"])}

@of
def truncating(model, params, batch, key):
    loss = nll(model, params, batch, key)
    kept = jnp.zeros(loss.shape, jnp.int32).at[:, 0].add(batch["weight"][:, 0] * 0.7)
    return {"loss/nll": jx.Sum.of(loss, batch["weight"]), "kept": jx.Sum.of(kept, batch["weight"])}

from ownpkg.data import Source

class Growing(Source):
    def batch(self, cursor, size):
        whole = super().batch(cursor, size)
        return whole | {"weight": whole["weight"].astype(np.float64 if cursor > 20 else np.float32)}
'''

KINDS = {
    "right": {},
    "mean": {"sums", "accumulation"},
    "confident": {"counts"},
    "coupled": {"sums", "examples", "accumulation"},
    "by_place": {"keys", "accumulation"},
    "shared": {"keys"},
    "deaf": {"gradients"},
    "rooted": {"gradients", "one device", "accumulation"},
    "asking": {"host"},
    "closing": {"replicated"},
    "truncating": {"promotions"},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
@pytest.mark.parametrize(("kind", "checks"), KINDS.items(), ids=KINDS)
def test_a_planted_error_by_import_path(folder, capsys, kind, checks):
    (folder / "planted.py").write_text(PLANTED)
    with jax.numpy_dtype_promotion("standard"):
        status, found, by_check = verdicts(capsys, "my.yaml", f"objective={{fn: 'planted:{kind}'}}", "mesh.data=2")
    failed = {name for name, verdict in found.items() if verdict == "failed"}
    assert failed == set(checks), [by_check[name]["why"] for name in failed]
    assert status == (1 if checks else 0)


@pytest.mark.slow
def test_batches_that_change_their_kind(folder, capsys):
    (folder / "planted.py").write_text(PLANTED)
    _, found, by_check = verdicts(capsys, "my.yaml", "data={fn: 'planted:Growing'}", "mesh.data=2")
    assert found["batches"] == "failed" and "weight" in by_check["batches"]["why"]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["mesh.fsdp=2", "mesh.data=2", "mesh.tensor=2"]], ids=["data", "cube"])
def test_a_shipped_recommender(folder, capsys, overrides):
    status, found, _ = verdicts(capsys, "my.yaml", "model.dropout=0.2", *overrides)
    assert status == 0 and found["keys"] == found["one device"] == found["recompiles"] == "passed"


@pytest.mark.slow
def test_the_report_in_words_and_in_python(folder, capsys):
    assert main(["audit", "my.yaml", "mesh.data=2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("compiled for data 2; ran on data 2 (2 x cpu, jax ") and out[-1].endswith("not applicable")
    assert sum(line.startswith("passed") for line in out) == int(out[-1].split()[0])
    report = jx.testing.audit(jx.build_task(jx.load_config("my.yaml", ["mesh.data=2"])))
    assert report.failed == [] and len(report.findings) == len(out) - 2
