"""Weights from files and checkpoints onto any mesh: the same bits as one device has, little read, all of it told."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from processes import Together

from jaxops.core import weights
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.core.named_arrays import HostArrays
from jaxops.core.safetensors import open_safetensors, save_safetensors
from jaxops.core.sharding import named_leaves
from jaxops.core.weights import Rename, WeightSource, cast_by_path, from_checkpoint, from_safetensors, with_arrays

RNG = np.random.default_rng(0)
P = jax.P
TREE = {
    "embed": {"embedding": RNG.normal(size=(16, 8)).astype(np.float32)},
    "layers": {
        "up": {"kernel": RNG.normal(size=(2, 8, 24)).astype(np.float32)},
        "norm": {"scale": RNG.normal(size=(2, 8)).astype(np.float32)},
    },
    "head": {"kernel": RNG.normal(size=(8, 16)).astype(np.float32)},
    "count": np.int32(7),
}
SPECS = {
    "embed/embedding": P("tensor", "fsdp"),
    "layers/up/kernel": P(None, "fsdp", "tensor"),
    "layers/norm/scale": P(),
    "head/kernel": P("fsdp", "tensor"),
    "count": P(),
}
FLAT = dict(named_leaves(TREE))


def targets(mesh, prefix="", dtype=None):
    return {
        prefix + path: jax.ShapeDtypeStruct(
            np.shape(x),
            x.dtype if dtype is None or x.dtype == np.int32 else dtype,
            sharding=None if mesh is None else jax.NamedSharding(mesh, SPECS[path]),
        )
        for path, x in FLAT.items()
    }


def saved(folder, tree=TREE):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, {"params": tree, "opt_state": {"mu": tree}, "frozen": {"base": {"w": np.ones(3)}}}, {})
    return Checkpoints(folder)


@pytest.fixture(params=["safetensors", "checkpoint"])
def source(request, tmp_path):
    """A function from rules to a source of TREE."""
    if request.param == "safetensors":
        save_safetensors(tmp_path / "a.safetensors", FLAT)
        return lambda *rules, **more: from_safetensors(tmp_path / "a.safetensors", rules, **more)
    checkpoints = saved(tmp_path / "c")
    return lambda *rules, **more: from_checkpoint(checkpoints, 3, rules, **more)


MESHES = [None, {"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, np.float16])
def test_every_mesh_gets_the_same_bits_in_the_dtype_of_its_target(source, axes, dtype):
    mesh = None if axes is None else make_mesh(**axes)
    wanted = targets(mesh, dtype=dtype)
    found, plan = weights.load_weights(wanted, [source()])
    assert list(found) == list(FLAT) and plan.left == () and plan.skipped == {}
    for path, x in found.items():
        like = wanted[path]
        assert x.dtype == like.dtype and x.shape == like.shape
        assert isinstance(x, np.ndarray) if mesh is None else x.sharding == like.sharding
        assert np.asarray(x).tobytes() == np.asarray(FLAT[path]).astype(like.dtype).tobytes()


@pytest.mark.parametrize("axes", [None, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_transposed_kernel(source, axes, dtype):
    mesh = None if axes is None else make_mesh(**axes)
    sharding = None if mesh is None else jax.NamedSharding(mesh, P("fsdp", "tensor"))
    stack = None if mesh is None else jax.NamedSharding(mesh, P(None, "tensor", "fsdp"))
    wanted = {
        "out/kernel": jax.ShapeDtypeStruct((16, 8), dtype, sharding=sharding),
        "up/kernel": jax.ShapeDtypeStruct((2, 24, 8), dtype, sharding=stack),
        "scale": jax.ShapeDtypeStruct((2, 8), dtype),
    }
    rules = [
        Rename("^head/", "out/", transpose=True),
        Rename("^layers/up/", "up/", transpose=True),
        Rename("^layers/norm/", ""),
    ]
    found, _ = weights.load_weights(wanted, [source(*rules)])
    expected = {"out/kernel": FLAT["head/kernel"].T, "up/kernel": FLAT["layers/up/kernel"].swapaxes(1, 2)}
    for path, x in (expected | {"scale": FLAT["layers/norm/scale"]}).items():
        np.testing.assert_array_equal(np.asarray(found[path]), x.astype(dtype))
        if wanted[path].sharding is not None:
            assert found[path].sharding == wanted[path].sharding


class Counted:
    """An array that counts the bytes that are read from it."""

    def __init__(self, array):
        self.array, self.dtype, self.shape, self.bytes = array, array.dtype, array.shape, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.bytes += part.nbytes
        return part


def test_each_slice_is_read_once_and_nothing_else(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", FLAT)
    arrays = {name: Counted(x) for name, x in open_safetensors(tmp_path / "a.safetensors").items()}
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    source = WeightSource("a", HostArrays(arrays))
    plan = weights.plan(targets(mesh), [source])
    assert len(plan.loaded) == 5 and all(x.bytes == 0 for x in arrays.values())
    weights.load_weights(targets(mesh), [source])
    assert {name: x.bytes for name, x in arrays.items()} == {
        name: x.nbytes for name, x in FLAT.items()
    }  # replicas once


def test_a_process_reads_what_its_devices_hold(tmp_path, monkeypatch):
    """The callback is asked for the slices of this process alone, so a process with one device reads an eighth."""
    mesh = make_mesh(fsdp=4, tensor=2)
    like = targets(mesh)["layers/up/kernel"]
    array = Counted(FLAT["layers/up/kernel"])
    made = []

    def of_one_device(shape, sharding, callback, dtype):
        index = sharding.devices_indices_map(shape)[mesh.devices.flat[5]]
        made.append((index, callback(index)))

    monkeypatch.setattr(jax, "make_array_from_callback", of_one_device)
    weights.load_weights({"x": like}, [WeightSource("a", HostArrays({"x": array}))])
    ((index, piece),) = made
    np.testing.assert_array_equal(piece, FLAT["layers/up/kernel"][index])
    assert array.bytes == FLAT["layers/up/kernel"].nbytes // 8


def test_a_loaded_array_outlives_its_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"x": np.arange(4096, dtype=np.float32)})
    for like in (
        jax.ShapeDtypeStruct((4096,), np.float32),
        jax.ShapeDtypeStruct((4096,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
    ):
        found, _ = weights.load_weights({"x": like}, [from_safetensors(path)])
        with open(path, "r+b") as file:
            file.seek(-4096 * 4, 2)
            file.write(b"\0" * 4096 * 4)
        np.testing.assert_array_equal(np.asarray(found["x"]), np.arange(4096))
        save_safetensors(path, {"x": np.arange(4096, dtype=np.float32)})


def test_several_sources_fill_one_tree(tmp_path, source):
    """sft -> policy/ and reference/, rm -> reward/: and what nobody has is left fresh."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    reward = {name: -x for name, x in FLAT.items() if name != "count"} | {"head.score": np.ones(8, np.float32)}
    save_safetensors(tmp_path / "rm.safetensors", {f"model.{name.replace('/', '.')}": x for name, x in reward.items()})
    wanted = targets(mesh, "policy/") | targets(mesh, "reference/", jnp.bfloat16) | targets(mesh, "reward/")
    wanted["reward/score"] = jax.ShapeDtypeStruct((9,), np.float32)
    wanted["value/kernel"] = jax.ShapeDtypeStruct((9,), np.float32)
    dots = [
        Rename(r"^model\.(\w+)\.(\w+)\.(\w+)$", r"reward/\1/\2/\3"),
        Rename(r"^model\.(\w+)\.(\w+)$", r"reward/\1/\2"),
    ]
    score = Rename(r"^model\.head\.score$", "reward/score")
    sft = source(Rename("^", "policy/"), name="sft"), source(Rename("^", "reference/"), name="sft again")
    rm = from_safetensors(tmp_path / "rm.safetensors", [score, *dots], name="rm")
    found, plan = weights.load_weights(wanted, [*sft, rm])
    for path, x in found.items():
        which, _, name = path.partition("/")
        expected = -FLAT[name] if which == "reward" else FLAT[name]
        np.testing.assert_array_equal(np.asarray(x), np.asarray(expected).astype(wanted[path].dtype))
    assert set(wanted) - set(found) == {"reward/score", "value/kernel", "reward/count"}
    assert plan.left == ("reward/count", "value/kernel")
    assert plan.skipped == {"reward/score": "[8] there, [9] here"}
    assert str(plan) == (
        "5 arrays from sft; 5 arrays from sft again; 4 arrays from rm;"
        " skipped for their shape: reward/score [8] there, [9] here; left fresh: reward/count, value/kernel"
    )


def test_the_first_rule_that_leads_to_a_target_counts(source):
    wanted = targets(None) | {"other/kernel": targets(None)["head/kernel"]}
    rules = [Rename("head", "nowhere"), Rename("head", "other"), Rename("head", "head"), Rename("^embed", "embed")]
    assert {path: name for path, (_, name, _) in weights.plan(wanted, [source(*rules)]).loaded.items()} == {
        "other/kernel": "head/kernel",
        "embed/embedding": "embed/embedding",
    }
    only = weights.plan(wanted, [source(match="^(head|count)")])
    assert set(only.loaded) == {"head/kernel", "count"}


def test_arrays_are_filled_into_a_tree(source):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = jax.tree.map(np.zeros_like, TREE) | {"fresh": np.ones(2)}
    state = jax.device_put(state, jax.NamedSharding(mesh, P()))
    found, plan = weights.load_weights(weights.targets_of(state), [source()])
    full = with_arrays(state, found)
    assert plan.left == ("fresh",) and jax.tree.structure(full) == jax.tree.structure(state)
    assert full["fresh"] is state["fresh"]
    for (path, x), (_, old) in zip(named_leaves(full), named_leaves(state), strict=True):
        assert jax.typeof(x) == jax.typeof(old)
        np.testing.assert_array_equal(np.asarray(x), FLAT.get(path, np.ones(2)))


def test_a_target_on_an_abstract_mesh_goes_to_the_mesh_that_is_set(source):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    like = jax.ShapeDtypeStruct(
        (8, 16), np.float32, sharding=jax.NamedSharding(mesh.abstract_mesh, P("fsdp", "tensor"))
    )
    with jax.set_mesh(mesh):
        found, _ = weights.load_weights({"head/kernel": like}, [source()])
    assert found["head/kernel"].sharding == jax.NamedSharding(mesh, P("fsdp", "tensor"))


def one(name, array):
    return WeightSource(name, HostArrays({"w": array}), [Rename("w", "here/w")])


def test_two_arrays_that_lead_to_one_target_are_refused():
    wanted = {"here/w": jax.ShapeDtypeStruct((2,), np.float32)}
    x = np.ones(2, np.float32)
    with pytest.raises(UserError, match="weights: w of a and w of b both lead to here/w"):
        weights.plan(wanted, [one("a", x), one("b", x)])
    both = WeightSource("a", HostArrays({"v": x, "w": x}), [Rename("[vw]", "here/w")])
    with pytest.raises(UserError, match="v of a and w of a both lead to here/w"):
        weights.plan(wanted, [both])


def test_a_source_of_which_nothing_fits_is_refused_with_names_of_both_sides(source):
    wanted = {"policy/decoder/w": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(UserError, match=r"nothing of sft fits: it has .*head/kernel.*; wanted are policy/decoder/w"):
        weights.plan(wanted, [source(name="sft")])
    with pytest.raises(UserError, match=r"it has policy/.*head/kernel.* \(as renamed\); wanted are policy/decoder/w"):
        weights.plan(wanted, [source(Rename("^", "policy/"))])
    with pytest.raises(UserError, match="no name has 'lora' in it; it has "):
        weights.plan(wanted, [source(match="lora")])
    other = {"head/kernel": jax.ShapeDtypeStruct((16, 8), np.float32)}
    with pytest.raises(UserError, match=r"skipped for their shape: head/kernel \[8, 16\] there, \[16, 8\] here"):
        weights.plan(other, [source()])
    good = one("good", np.ones(2, np.float32))
    with pytest.raises(UserError, match="nothing of sft fits"):
        weights.plan({"here/w": jax.ShapeDtypeStruct((2,), np.float32)}, [good, source(name="sft")])


@pytest.mark.parametrize(
    ("rename", "match", "message"),
    [
        ([Rename("(", "x")], "", r"'\(' of a is not a regular expression"),
        ([Rename("w", r"\2")], "", r"'\\\\2' of a is no replacement for 'w'"),
        ([], "(", r"'\(' of a is not a regular expression"),
    ],
)
def test_rules_that_are_no_patterns_are_refused(rename, match, message):
    wanted = {"w": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(UserError, match=message):
        weights.plan(wanted, [WeightSource("a", HostArrays({"w": np.ones(2, np.float32)}), rename, match)])


@pytest.mark.parametrize(
    ("there", "here", "fits"),
    [
        (np.float64, np.float32, True),
        (np.float16, ml_dtypes.bfloat16, True),
        (ml_dtypes.bfloat16, np.float32, True),
        (np.int8, np.int32, True),
        (np.uint8, np.int16, True),
        (np.bool_, np.bool_, True),
        (np.int64, np.int32, False),
        (np.uint8, np.int8, False),
        (np.float32, np.int32, False),
        (np.int32, np.float32, False),
        (np.bool_, np.int8, False),
        (np.int8, np.bool_, False),
    ],
)
def test_a_dtype_never_changes_its_sort(there, here, fits):
    x = np.ones(2, there)
    wanted = {"here/w": jax.ShapeDtypeStruct((2,), here)}
    if fits:
        found, _ = weights.load_weights(wanted, [one("a", x)])
        assert found["here/w"].dtype == here and found["here/w"].tolist() == [1, 1]
    else:
        with pytest.raises(UserError, match=f"w of a is {np.dtype(there)}, but here/w is {np.dtype(here)}"):
            weights.plan(wanted, [one("a", x)])


@pytest.mark.parametrize("axes", [None, {"fsdp": 4, "tensor": 2}], ids=str)
def test_numbers_of_a_checkpoint_that_do_not_fit_are_refused(tmp_path, axes):
    x = np.full((8, 2), 1e5, np.float32)
    sharding = axes and jax.NamedSharding(make_mesh(**axes), P("fsdp", "tensor"))
    wanted = {"w": jax.ShapeDtypeStruct((8, 2), np.float16, sharding=sharding)}
    with pytest.raises(UserError, match="w holds numbers that do not fit into float16"):
        weights.load_weights(wanted, [from_checkpoint(saved(tmp_path / "a", {"w": x}), 3)])
    x[:] = np.inf
    found, _ = weights.load_weights(wanted, [from_checkpoint(saved(tmp_path / "b", {"w": x}), 3)])
    assert np.isinf(np.asarray(found["w"])).all()


def test_numbers_that_do_not_fit_are_refused():
    wanted = {"here/w": jax.ShapeDtypeStruct((2,), np.float16)}
    with pytest.raises(UserError, match="w holds numbers that do not fit into float16"):
        weights.load_weights(wanted, [one("a", np.array([1.0, 1e6], np.float32))])
    found, _ = weights.load_weights(wanted, [one("a", np.array([1.0, np.inf], np.float32))])
    assert found["here/w"].tolist() == [1, math.inf]


def test_a_checkpoint_gives_its_frozen_and_other_parts_too(tmp_path):
    checkpoints = saved(tmp_path)
    found, _ = weights.load_weights(
        {"base/w": jax.ShapeDtypeStruct((3,), np.float64)}, [from_checkpoint(checkpoints, 3)]
    )
    np.testing.assert_array_equal(found["base/w"], np.ones(3))
    average = from_checkpoint(checkpoints, 3, inside=["opt_state/mu"])
    found, _ = weights.load_weights({"head/kernel": jax.ShapeDtypeStruct((8, 16), np.float32)}, [average])
    np.testing.assert_array_equal(found["head/kernel"], FLAT["head/kernel"])
    with pytest.raises(UserError, match="4"):
        from_checkpoint(checkpoints, 4)


def test_load_leaves_says_what_is_not_there(tmp_path):
    checkpoints = saved(tmp_path)
    with pytest.raises(UserError, match=r"holds no params/head/kernels; did you mean 'params/head/kernel'\?"):
        checkpoints.load_leaves(3, {"params/head/kernels": jax.ShapeDtypeStruct((8, 16), np.float32)})
    with pytest.raises(ValueError, match=r"params/head/kernel is float32\[8, 16\] in .*, not float32\[16, 8\]"):
        checkpoints.load_leaves(3, {"params/head/kernel": jax.ShapeDtypeStruct((16, 8), np.float32)})


def test_a_bfloat16_base_under_float32_adapters():
    tree = {
        "layers": {"up": {"kernel": np.ones((2, 3), np.float32), "lora_a": np.ones((2, 1), np.float32)}},
        "norm": {"scale": np.ones(3, np.float32)},
        "ids": np.arange(3, dtype=np.int32),
    }
    rules = [("lora_", "float32"), ("scale$", np.float16)]
    for given in (tree, jax.tree.map(jnp.asarray, tree), jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))):
        found = cast_by_path(given, rules, jnp.bfloat16)
        assert {path: str(x.dtype) for path, x in named_leaves(found)} == {
            "ids": "int32",
            "layers/up/kernel": "bfloat16",
            "layers/up/lora_a": "float32",
            "norm/scale": "float16",
        }
        assert jax.tree.structure(found) == jax.tree.structure(given)
    kept = cast_by_path(tree, [("lora_", jnp.bfloat16)])
    assert kept["norm"]["scale"] is tree["norm"]["scale"] and kept["layers"]["up"]["lora_a"].dtype == jnp.bfloat16
    traced = jax.jit(lambda t: cast_by_path(t, rules, "bfloat16"))(tree)
    assert traced["layers"]["up"]["kernel"].dtype == jnp.bfloat16
    sharded = jax.ShapeDtypeStruct((8,), np.float32, sharding=jax.NamedSharding(make_mesh(fsdp=-1), P("fsdp")))
    assert cast_by_path({"x": sharded}, [("x", "bfloat16")])["x"].sharding == sharded.sharding


@pytest.mark.parametrize(
    ("rules", "default", "message"),
    [
        ([("(", "float32")], None, r"'\(' is not a regular expression"),
        ([("lora", "float32")], None, r"'lora' is found in no path \(there are: kernel\)"),
        ([("kernel", "int8")], None, "'int8' is no floating dtype"),
        ([("kernel", "float33")], None, "'float33' is no floating dtype"),
        ([], "int32", "'int32' is no floating dtype"),
    ],
)
def test_rules_of_dtypes_that_are_none(rules, default, message):
    with pytest.raises(UserError, match=message):
        cast_by_path({"kernel": np.ones(2, np.float32)}, rules, default)


TWO = """
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.mesh import make_mesh
from jaxops.core.weights import Rename, from_checkpoint, from_safetensors, load_weights
folder = sys.argv[1]
mesh = make_mesh(fsdp=2, tensor=2)
whole = np.load(f"{folder}/whole.npy")
spec = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
for dtype in (np.float32, jax.numpy.bfloat16):
    for turn in (False, True):
        like = jax.ShapeDtypeStruct(whole.shape[::-1] if turn else whole.shape, dtype, sharding=spec)
        rule = [Rename("^", "policy/", transpose=turn)]
        for source in (
            from_safetensors(f"{folder}/a.safetensors", rule), from_checkpoint(Checkpoints(f"{folder}/c"), 3, rule)
        ):
            found, _ = load_weights({"policy/w": like}, [source])
            assert found["policy/w"].sharding == spec and found["policy/w"].dtype == dtype
            for shard in found["policy/w"].addressable_shards:
                np.testing.assert_array_equal(shard.data, (whole.T if turn else whole)[shard.index].astype(dtype))
"""


@pytest.mark.slow
def test_two_processes_load_their_parts(tmp_path):
    np.save(tmp_path / "whole.npy", FLAT["embed/embedding"])
    save_safetensors(tmp_path / "a.safetensors", {"w": FLAT["embed/embedding"]})
    saved(tmp_path / "c", {"w": FLAT["embed/embedding"]})
    with Together(TWO, tmp_path, count=2, devices=2) as job:
        job.end()
