"""Saving, restoring and resharding real arrays; errors that are not lost; damage that is found."""

import builtins
import dataclasses
import gc
import json
import os
import pathlib
import resource
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxops.core import manifest, orbax_io, store_paths, writing
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.manifest import SavedArray

P = PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: Any
    frozen: Any
    opt_state: Any
    extra: Any
    step: Any


def make_mesh(*sizes):
    names = ("data", "fsdp")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Explicit,) * len(sizes))


def values(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.standard_normal((16, 8)).astype(np.float32),
        "layers": {i: {"w": rng.standard_normal((8, 8)).astype(np.float32)} for i in range(2)},
        "scale": rng.standard_normal(8).astype(np.float32),
    }


def make_state(mesh, seed=0):
    """Adam's state and all, each matrix split over the mesh, in float32 and bfloat16."""
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P(mesh.axis_names[-1]) if x.ndim == 2 else P()))
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(place, values(seed))
        opt_state = optax.adamw(1e-3).init(params)
        extra = {"ema": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), "none": None}
        step = jax.device_put(np.int32(seed), NamedSharding(mesh, P()))
        return State(params, {}, opt_state, extra, step)


def abstract(state, mesh=None, spec=lambda x: P()):
    place = lambda x: x.sharding if mesh is None else NamedSharding(mesh, spec(x))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as opened:
        yield opened


def small(value=1.0):
    return {"params": {"w": jnp.full((4, 4), value), "b": jnp.zeros(4)}, "step": jnp.int32(3)}


# Round trips


@pytest.mark.latest
def test_a_state_comes_back_exactly_as_it_was(checkpoints):
    state = make_state(make_mesh(8), seed=7)
    checkpoints.save(7, state, {"cursor": 7 * 256, "config": {"a": [1, None]}}, {"valid/ndcg@10": 0.25})
    found = checkpoints.restore(7, abstract(state))
    assert_same(found, state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), found, state))
    assert checkpoints.steps() == [7]
    assert checkpoints.latest() == checkpoints.latest_good(pytest.fail) == 7
    assert checkpoints.meta(7) == {"cursor": 7 * 256, "config": {"a": [1, None]}}
    assert checkpoints.metrics(7) == {"valid/ndcg@10": 0.25}
    assert checkpoints.verify(7) == []


@pytest.mark.latest
def test_resharding_from_eight_to_two_by_four_to_one(tmp_path):
    state = make_state(make_mesh(8))
    meshes = [
        (make_mesh(2, 4), lambda x: P("fsdp", "data") if x.ndim == 2 else P()),
        (make_mesh(1), lambda x: P("data") if x.ndim == 2 else P()),
        (make_mesh(4, 2), lambda x: P(("data", "fsdp")) if x.ndim else P()),
    ]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for step, (mesh, spec) in enumerate(meshes, 1):
            target = abstract(state, mesh, spec)
            found = checkpoints.restore(step, target)
            assert_same(found, state)
            for array, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
                assert array.sharding == wanted.sharding
            assert set(jax.typeof(found.params["embed"]).sharding.mesh.axis_types) == {AxisType.Explicit}
            checkpoints.save(step + 1, found, {})
        assert_same(checkpoints.restore(4, abstract(state)), state)


def test_an_abstract_state_from_eval_shape_uses_the_mesh_in_force(checkpoints):
    mesh = make_mesh(8)
    state = make_state(mesh)
    checkpoints.save(1, state, {})
    with jax.set_mesh(mesh):
        target = jax.eval_shape(lambda s: jax.tree.map(lambda x: x * 1, s), state)
        found = checkpoints.restore(1, target)
    assert_same(found, state)
    assert found.params["embed"].sharding.is_equivalent_to(state.params["embed"].sharding, 2)


@pytest.mark.latest
def test_every_dtype_and_shape(checkpoints):
    x = jnp.arange(-8, 8).reshape(4, 4)
    dtypes = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "int4", "uint32", "bool")
    tree = {name: x.astype(name) for name in dtypes}
    tree |= {"scalar": jnp.float32(0.1), "one": jnp.ones((1, 1, 1)), "none": None, "nothing": {}}
    tree |= {"empty": jnp.zeros((0, 3), jnp.bfloat16), "numpy": np.arange(3), "python": 1.5}
    checkpoints.save(1, tree, {})
    found = checkpoints.restore(1, tree)
    assert_same(found, jax.tree.map(lambda x: x if hasattr(x, "dtype") else np.asarray(x), tree))
    assert isinstance(found["numpy"], np.ndarray) and isinstance(found["int4"], jax.Array)


def test_numpy_arrays_where_no_sharding_is_given(checkpoints):
    state = make_state(make_mesh(8))
    checkpoints.save(1, state, {})
    found = checkpoints.restore(1, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert_same(found, state)


def test_a_bare_tree_of_one_kind(checkpoints):
    checkpoints.save(1, [jnp.arange(3), (jnp.ones(2),)], {})
    found = checkpoints.restore(1, [jnp.zeros(3, jnp.int32), (jnp.zeros(2),)])
    np.testing.assert_array_equal(found[0], [0, 1, 2])
    np.testing.assert_array_equal(found[1][0], [1, 1])


# Without the mesh or the code that wrote them


@pytest.mark.latest
def test_params_load_as_numpy_without_a_mesh(tmp_path):
    state = make_state(make_mesh(8))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
    reader = Checkpoints(tmp_path)
    found = reader.load_params(5)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert_same(found, values())  # integer keys included
    assert_same(reader.load_params(5, "params/layers/1"), values()["layers"][1])
    assert_same(reader.load_params(5, "extra/ema/scale"), np.asarray(state.extra["ema"]["scale"]))
    assert set(reader.load_params(5, "")) == {"params", "opt_state", "extra", "step"}


def test_params_load_onto_a_sharding(checkpoints):
    checkpoints.save(5, make_state(make_mesh(8)), {})
    everywhere = NamedSharding(make_mesh(2), P())
    found = checkpoints.load_params(5, sharding=everywhere)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(found))
    assert_same(found, values())


def test_an_unknown_prefix_says_what_there_is(checkpoints):
    checkpoints.save(5, small(), {})
    message = r"5 holds nothing under 'param'; did you mean 'params'\? \(it holds params, step\)"
    with pytest.raises(UserError, match=message):
        checkpoints.load_params(5, "param")


def test_describe_needs_no_mesh(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(make_mesh(2, 4)), {})
    found = Checkpoints(tmp_path).describe(5)
    assert SavedArray("params/embed", (16, 8), "float32", 512) in found
    assert SavedArray("extra/ema/layers/1/w", (8, 8), "bfloat16", 128) in found
    assert SavedArray("opt_state/0/mu/embed", (16, 8), "float32", 512) in found
    assert SavedArray("step", (), "int32", 4) in found


@pytest.mark.latest
def test_orbax_alone_reads_it_as_plain_dicts(tmp_path):
    from orbax.checkpoint import v1 as ocp

    state = make_state(make_mesh(8))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
    stored = ocp.metadata(tmp_path / "5").metadata
    assert type(stored) is dict and set(stored["opt_state"]["0"]) == {"count", "mu", "nu"}
    found = ocp.load(tmp_path / "5", jax.tree.map(lambda x: np.empty(x.shape, x.dtype), stored))
    np.testing.assert_array_equal(found["params"]["layers"]["1"]["w"], values()["layers"][1]["w"])
    assert json.loads((tmp_path / "5" / "jaxops.json").read_text())["manifest"]["step"] == 5


# Differences


def test_differences_are_all_named_before_anything_is_loaded(checkpoints, monkeypatch):
    checkpoints.save(1, make_state(make_mesh(8)), {})
    monkeypatch.setattr(checkpoints, "_load", lambda *_: pytest.fail("loaded"))
    target = abstract(make_state(make_mesh(8)))
    params = dict(target.params)
    params["embed"] = jax.ShapeDtypeStruct((32, 8), jnp.float32)
    params["scale"] = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    params["layers"] = {0: params["layers"][0], 11: params["layers"][1]}
    with pytest.raises(UserError) as caught:
        checkpoints.restore(1, dataclasses.replace(target, params=params))
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("1 does not fit this run:")
    assert [line.strip() for line in lines] == [
        "params/embed: shape [16, 8] in the checkpoint, [32, 8] expected",
        "params/layers/11/w: not in the checkpoint, float32[8, 8] expected; did you mean 'params/layers/1/w'?",
        "params/scale: float32 in the checkpoint, bfloat16 expected",
        "params/layers/1/w: float32[8, 8] in the checkpoint, not expected",
    ]


def test_many_differences_are_cut_short(checkpoints):
    checkpoints.save(1, {f"w{i}": jnp.zeros(2) for i in range(30)}, {})
    with pytest.raises(UserError, match=r"\.\.\. and 18 more"):
        checkpoints.restore(1, {f"w{i}": jnp.zeros(3) for i in range(30)})


def test_a_step_that_is_not_there(checkpoints):
    checkpoints.save(1, small(), {})
    for call in (checkpoints.meta, checkpoints.metrics, checkpoints.describe, checkpoints.verify):
        with pytest.raises(UserError, match=r"no checkpoint of step 2 in .*; there are steps 1"):
            call(2)
    with pytest.raises(UserError, match="no checkpoint of step 2"):
        checkpoints.restore(2, small())
    with pytest.raises(UserError, match="no checkpoint of step 2"):
        checkpoints.load_params(2)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    opened = Checkpoints(tmp_path / "checkpoints")
    for call in (opened.steps, opened.latest, opened.best, lambda: opened.latest_good(print)):
        with pytest.raises(UserError, match="cannot read the checkpoint folder"):
            call()


def test_nothing_saved_yet(tmp_path):
    opened = Checkpoints(tmp_path / "none")
    assert opened.steps() == [] and opened.latest() is opened.best() is opened.latest_good(print) is None
    assert not (tmp_path / "none").exists()


# Saving while training goes on


@pytest.fixture(params=["copied", "held"])
def how(request, monkeypatch):
    """Both ways of taking hold of values: copies on CPU, and what accelerators do."""
    if request.param == "held":
        monkeypatch.setattr(writing, "on_cpu", lambda leaf: False)
    return request.param


@pytest.mark.latest
def test_a_donated_state_is_saved_as_it_was(tmp_path, how):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    place = lambda spec: jax.device_put(np.ones((64, 256), np.float32), NamedSharding(make_mesh(8), spec))
    state = {"sharded": place(P("data")), "replicated": place(P())}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for i in range(4):
            checkpoints.save(i, state, {})
            state = step(state)
        for i in range(4):
            found = checkpoints.load_params(i, "")
            assert (found["sharded"] == 2.0**i).all() and (found["replicated"] == 2.0**i).all()


def test_numpy_arrays_may_be_overwritten(tmp_path, how):
    state = {"w": np.ones((64, 64)), "x": jnp.zeros(1)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        state["w"][:] = 7
        assert (checkpoints.load_params(1, "w") == 1).all()


@pytest.fixture
def stalled(monkeypatch):
    """The background part of a save waits until `stalled.set()`."""
    event, survey = threading.Event(), manifest.survey

    def wait_first(*args, **kwargs):
        assert event.wait(30)
        return survey(*args, **kwargs)

    monkeypatch.setattr(manifest, "survey", wait_first)
    yield event
    event.set()


def test_a_save_does_not_wait_and_counts_only_when_whole(checkpoints, stalled):
    checkpoints.save(1, small(), {})
    assert Checkpoints(checkpoints._folder.path).steps() == []  # as another process sees it
    checkpoints.check()
    stalled.set()
    checkpoints.wait()
    assert Checkpoints(checkpoints._folder.path).steps() == [1]


def test_reading_waits_for_the_save_under_way(checkpoints, stalled):
    checkpoints.save(1, small(), {})
    threading.Timer(0.2, stalled.set).start()
    assert checkpoints.latest() == 1


def test_saving_and_waiting(checkpoints):
    checkpoints.save(1, small(), {}, wait=True)
    assert Checkpoints(checkpoints._folder.path).steps() == [1]


def test_a_step_saved_again_is_replaced(checkpoints):
    checkpoints.save(1, small(1.0), {"cursor": 1})
    checkpoints.save(2, small(2.0), {"cursor": 2})
    checkpoints.save(1, small(3.0), {"cursor": 3})
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.latest() == 1  # saved last: the run went back
    assert checkpoints.meta(1) == {"cursor": 3}
    assert (checkpoints.load_params(1, "params/w") == 3).all()
    assert sorted(path.name for path in checkpoints._folder.path.iterdir()) == ["1-2", "2"]


def test_retention_while_saving(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=4, best="hr") as checkpoints:
        for step, hr in enumerate([0.1, 0.2, 0.9, 0.3, 0.3, float("nan"), None, 0.5, 0.4]):
            checkpoints.save(step, small(), {}, None if hr is None else {"hr": hr})
        assert checkpoints.steps() == [0, 2, 4, 7, 8]
        assert checkpoints.best() == 2
        assert checkpoints.metrics(8) == {"hr": 0.4}
        assert {p.name for p in tmp_path.iterdir()} == {"0", "2", "4", "7", "8"}


def test_least_is_best(tmp_path):
    with Checkpoints(tmp_path, keep=1, best="loss", best_mode="min") as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, float("inf")]):
            checkpoints.save(step, small(), {}, {"loss": loss})
        assert (checkpoints.best(), checkpoints.steps()) == (1, [1, 3])


def test_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(TypeError):
        checkpoints.save(1, small(), {"x": object()})
    assert not (tmp_path / "c").exists()


def test_compression_is_a_choice(tmp_path):
    zeros = {"w": jnp.zeros((256, 1024))}
    sizes = []
    for compress in (False, True):
        with Checkpoints(tmp_path / str(compress), compress=compress) as checkpoints:
            checkpoints.save(1, zeros, {})
            assert not checkpoints.load_params(1, "w").any()
        sizes.append(sum(p.stat().st_size for p in (tmp_path / str(compress)).rglob("*") if p.is_file()))
    assert sizes[0] > 2**20 > 10 * sizes[1]


@pytest.mark.parametrize("rows", [4096, 4099])  # 4099 is a prime: orbax would cut it to single rows
def test_large_arrays_are_cut_to_pieces_where_that_goes_evenly(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(orbax_io, "_CHUNK", 1 << 18)
    monkeypatch.setattr(orbax_io, "_FILE", 1 << 20)
    state = {"table": jnp.arange(rows * 256.0).reshape(rows, 256), "even": jnp.arange(2.0**18), "one": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        assert_same(checkpoints.restore(1, state), state)
        assert checkpoints.verify(1) == []
    chunks = {
        one["array_metadata"]["param_name"]: one["array_metadata"]["chunk_shape"]
        for one in json.loads((tmp_path / "1/state/array_metadatas/process_0").read_text())["array_metadatas"]
    }
    assert chunks == {"table": [256, 256] if rows == 4096 else [4099, 256], "even": [2**16], "one": [3]}
    files = [path for path in (tmp_path / "1/state").rglob("d/*") if path.stat().st_size > 1 << 16]
    assert len(files) >= 3 if rows == 4096 else len(files) == 1


def test_object_stores_are_committed_without_renaming():
    mode = orbax_io.options(store_paths.path("gs://bucket/run/checkpoints"), (), compress=False).atomicity.mode
    assert mode.name == "COMMIT_FILE"


# Saves that fail


@pytest.fixture
def full_disk():
    """No file may grow beyond 64 KiB, as long as the test runs; the test must `lift` it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    lift = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    yield lift
    lift()


def big():
    return {"w": jnp.ones((256, 1024))}


def test_a_failed_save_is_raised_at_the_next_call_and_leaves_the_others(checkpoints, full_disk):
    checkpoints.save(1, small(), {})
    checkpoints.save(2, big(), {})
    with pytest.raises(RunFailed, match=r"saving .*/2 failed: .*; the checkpoints before it are untouched") as e:
        checkpoints.save(3, small(), {})
    assert e.value.__cause__ is not None
    assert checkpoints.steps() == [1]  # raised once
    full_disk()
    checkpoints.save(2, big(), {})
    assert checkpoints.latest_good(pytest.fail) == 2
    assert sorted(path.name for path in checkpoints._folder.path.iterdir()) == ["1", "2"]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("names", ["2.orbax", "ocdbt", "_METADATA"])
def test_a_failed_save_leaves_no_thread_that_keeps_the_process(checkpoints, monkeypatch, names):
    """Orbax's threads would wait five minutes for signals of the part that failed."""
    checkpoints.save(1, small(), {}, wait=True)

    def refusing(real):
        def made(path, *args, **kwargs):
            if names in str(path):
                raise OSError(28, "No space left on device", str(path))
            return real(path, *args, **kwargs)

        return made

    for name in ("mkdir", "makedirs", "open"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(builtins, "open", refusing(open))
    with pytest.raises(RunFailed, match=r"saving .*/2 failed: .*No space left on device"):
        checkpoints.save(2, small(), {}, wait=True)
    until = time.monotonic() + 20
    waiting = lambda: [t for t in threading.enumerate() if type(t).__name__ == "_SignalingThread"]
    while waiting() and time.monotonic() < until:
        time.sleep(0.05)
    assert not waiting()
    gc.collect()


@pytest.mark.parametrize("call", ["wait", "close", "steps", "latest", "best", "meta", "restore", "exit", "check"])
def test_no_call_loses_the_error(tmp_path, monkeypatch, call):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", broken)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(), {})
    checkpoints._thread.join()
    calls = {
        "meta": lambda: checkpoints.meta(1),
        "restore": lambda: checkpoints.restore(1, small()),
        "exit": lambda: checkpoints.__exit__(None, None, None),
    }
    with pytest.raises(RunFailed, match="No space left on device"):
        calls.get(call, getattr(checkpoints, call, None))()
    assert checkpoints.steps() == []
    checkpoints.close()


def test_an_error_on_the_way_out_is_added_to_the_one_that_caused_it(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "write", lambda *_: 1 / 0)
    with pytest.raises(KeyError) as caught, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(), {})
        raise KeyError("mine")
    assert "failed: ZeroDivisionError" in caught.value.__notes__[0]


def test_a_save_that_cannot_start(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(type(epath.Path("/")), "mkdir", read_only)
    with pytest.raises(RunFailed, match=r"saving .*/none/1 failed: .*Read-only file system"):
        Checkpoints(tmp_path / "none").save(1, small(), {})


def test_leaves_that_share_a_name_are_refused(checkpoints):
    with pytest.raises(ValueError, match="share the name"):
        checkpoints.save(1, {"a.b": jnp.zeros(1), "a": {"b": jnp.ones(1)}}, {})


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / "1.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [] and left.exists()
        checkpoints.save(2, small(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


# Damage


def data_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.fixture
def three(tmp_path):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.full((64, 64), float(step))}, {})
    return tmp_path


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.latest
def test_a_flipped_byte_and_a_truncated_file_are_found_and_named(three):
    flip(data_file(three / "3"))
    cut = data_file(three / "2")
    cut.write_bytes(cut.read_bytes()[:-10])
    checkpoints = Checkpoints(three)
    (problem,) = checkpoints.verify(3)
    assert problem == f"{data_file(three / '3').relative_to(three / '3')}: contents were changed (CRC-32 differs)"
    (problem,) = checkpoints.verify(2)
    assert problem.startswith(f"{cut.relative_to(three / '2')}: ") and "bytes, expected" in problem
    assert checkpoints.verify(1) == []

    warnings = []
    before = {p: p.stat().st_mtime_ns for p in three.rglob("*")}
    assert checkpoints.latest_good(warnings.append) == 1
    assert [w.split(" is damaged")[0][-1] for w in warnings] == ["3", "2"]
    assert {p: p.stat().st_mtime_ns for p in three.rglob("*")} == before
    with pytest.raises(UserError, match=r"/2 is damaged: .*bytes, expected"):
        checkpoints.restore(2, {"w": jnp.zeros((64, 64))})
    assert (checkpoints.load_params(1, "w") == 1).all()


def test_every_file_of_a_checkpoint_is_guarded(three):
    files = [p for p in (three / "3").rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 8
    for path in files:
        flip(path)
        assert len(Checkpoints(three).verify(3)) == 1, path
        flip(path)
    assert Checkpoints(three).verify(3) == []


def test_all_damaged_is_an_error_not_a_fresh_start(three):
    for step in "123":
        flip(data_file(three / step))
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(steps 1, 2, 3\)"):
        Checkpoints(three).latest_good(lambda _: None)


def test_a_damaged_manifest_is_an_error_that_says_so(three):
    (three / "3" / "jaxops.json").write_text("{")
    checkpoints = Checkpoints(three)
    with pytest.raises(UserError, match=r"/3 is damaged: jaxops\.json cannot be read"):
        checkpoints.meta(3)
    assert checkpoints.verify(3)[0].startswith("jaxops.json cannot be read")
    assert checkpoints.latest() == 2


def test_files_that_orbax_cannot_read_are_an_error_that_says_so(three):
    flip(three / "3" / "state" / "manifest.ocdbt", at=0)
    with pytest.raises(UserError, match=r"checkpoint .*/3 cannot be read: "):
        Checkpoints(three).restore(3, {"w": jnp.zeros((64, 64))})


def test_checksums_may_be_left_out(tmp_path):
    with Checkpoints(tmp_path, checksums=False) as checkpoints:
        checkpoints.save(1, small(), {})
        assert checkpoints.latest_good(pytest.fail) == 1
        assert checkpoints.verify(1) == [
            "no checksums were written: the sizes are right, the contents are not known to be"
        ]


# Quiet


def test_a_save_killed_before_its_checksums_is_completed_by_who_goes_on_from_it(three):
    folder = epath.Path(three / "3")
    bare = manifest.read(folder)
    sums = {name: file.crc32 for name, file in bare.files.items()}
    manifest.write(
        folder, dataclasses.replace(bare, files={n: manifest.File(f.bytes, None) for n, f in bare.files.items()})
    )
    with Checkpoints(three) as checkpoints:
        assert [text.partition(":")[0] for text in checkpoints.verify(3)] == ["no checksums were written"]
        checkpoints.complete(3)
        assert checkpoints.verify(3) == []
    assert {name: file.crc32 for name, file in manifest.read(folder).files.items()} == sums
    before = (folder / manifest.FILE).stat()
    Checkpoints(three).complete(3)
    assert (folder / manifest.FILE).stat() == before


@pytest.mark.latest
def test_importing_is_cheap_and_orbax_says_nothing_but_a_lost_save_is_told(tmp_path):
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from jaxops.core.checkpoint import Checkpoints
print("orbax" in sys.modules, "tensorstore" in sys.modules)
import jax.numpy as jnp
with Checkpoints(sys.argv[1]) as c:
    c.save(1, {"w": jnp.ones(3)}, {})
    print(c.restore(1, {"w": jnp.ones(3)})["w"].sum())
import absl.logging
absl.logging.info("others may speak")
forgotten = Checkpoints(sys.argv[1])
from jaxops.core import manifest
manifest.write = lambda *_: 1 / 0
forgotten.save(2, {"w": jnp.ones(3)}, {})
forgotten._thread.join()
"""
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "3.0"]
    assert [line for line in done.stderr.splitlines() if "absl" in line] == ["INFO:absl:others may speak"]
    assert "orbax" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "/2 failed: ZeroDivisionError" in last and last.endswith("(Checkpoints.close() was not called)")
