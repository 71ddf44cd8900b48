"""Collectives of compiled programs: their axes in every notation, their bytes, their loops, and each counted once."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxops.core.mesh import make_mesh
from jaxops.plan.collectives import collectives

AXES = {"data": 2, "fsdp": 2, "tensor": 2}
HEAD = "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[16] {\n"


def one(line: str, axes=AXES, slices: int = 1):
    (found,) = collectives(f"{HEAD}  %x = {line}\n}}\n", axes, slices)
    return found


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp", "tensor")),
        ("[4,2]<=[8]", ("tensor",)),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor")),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("mesh['a'=2,'b'=4] {'b'}", ("fsdp", "tensor")),
        ("mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ("data", "tensor")),
        ("mesh['a'=4,'b'=2, device_ids=([0,4,1,5,2,6,3,7])] {'b'}", ("data",)),
        ("mesh['a'=4,'b'=2, device_ids=[8]<=[2,4]T(1,0)] {'b'}", ("data",)),
        ("{}", ("data", "fsdp", "tensor")),
    ],
)
def test_the_axes_of_a_collective_in_every_notation(groups, axes):
    found = one(f"f32[16]{{0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}")
    assert found.axes == axes
    assert (found.kind, found.bytes, found.in_loop, found.between_slices) == ("all-gather", 64, False, False)


def test_a_permutation_has_the_axes_along_which_its_pairs_differ():
    found = one("bf16[4,2]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}")
    assert (found.axes, found.bytes) == (("tensor",), 16)


def test_what_crosses_slices_is_told():
    inside = one("f32[4]{0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add", slices=2)
    across = one("f32[4]{0} all-reduce(%p), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add", slices=2)
    assert (inside.between_slices, across.between_slices) == (False, True)


def test_a_group_of_one_device_exchanges_nothing():
    assert collectives(f"{HEAD}  %x = f32[4]{{0}} all-reduce(%p), replica_groups={{{{0}},{{1}}}}\n}}\n", AXES) == []


def test_the_parts_of_a_tuple_are_added_and_a_start_counts_its_result():
    whole = one("(f32[4]{0:T(128)}, bf16[2,2]{1,0}) all-reduce(%p, %q), replica_groups=[4,2]<=[8], to_apply=%add")
    assert whole.bytes == 16 + 8
    start = one("(f32[8]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}")
    assert start.bytes == 64


def test_one_exchange_in_several_fusions_is_counted_once_and_a_loop_as_often_as_it_runs():
    gather = "f32[16]{0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}"
    text = f"""HloModule m

%body (p: f32[8]) -> f32[8] {{
  %a = {gather}
}}

%again (p: f32[8]) -> f32[8] {{
  %b = {gather}
}}

%condition (p: f32[8]) -> pred[] {{
  %n = s32[]{{:T(128)}} constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %w = f32[8]{{0}} while(%p), condition=%condition, body=%body
  %f = f32[8]{{0}} fusion(%w), kind=kLoop, calls=%again
}}
"""
    (found,) = collectives(text, AXES)
    assert (found.count, found.bytes, found.in_loop, found.largest) == (1, 12 * 64, True, 64)


def test_exchanges_of_shard_map_have_one_channel_and_each_counts():
    """A recommender's look-up: ids and rows, there and back, all on channel 1; a fusion repeats one of them."""
    exchange = "all-to-all(%p), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}, metadata={op_name="
    text = f"""HloModule m

%repeated (p: f32[8]) -> f32[8] {{
  %a = f32[16,4]{{1,0:T(8,128)S(1)}} {exchange}"lookup/all_to_all"}}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %b = s32[16,1]{{1,0:T(1,128)S(1)}} {exchange}"lookup/all_to_all"}}
  %c = f32[16,4]{{1,0:T(8,128)S(1)}} {exchange}"lookup/all_to_all"}}
  %d = s32[16,1]{{1,0:T(1,128)S(1)}} {exchange}"lookup/all_to_all"}}
  %f = f32[8]{{0}} fusion(%c), kind=kLoop, calls=%repeated
}}
"""
    (found,) = collectives(text, AXES)
    assert (found.count, found.bytes, found.largest) == (3, 64 + 256 + 64, 256)


def test_a_program_of_ours_gathers_over_fsdp_and_reduces_over_tensor():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    place = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def layers(x, kernels):
        def layer(x, kernel):
            whole = jax.lax.with_sharding_constraint(kernel, P(None, "tensor"))
            y = jax.lax.with_sharding_constraint(x @ whole, P("data", "tensor"))
            return jax.lax.with_sharding_constraint(y @ whole.T, P("data", None)), None

        return jax.lax.scan(layer, x, kernels)[0]

    run = jax.jit(jax.sharding.auto_axes(layers, out_sharding=P("data")))
    with jax.set_mesh(mesh):
        text = run.lower(place((8, 16), "data"), place((3, 16, 32), None, "fsdp", "tensor")).compile().as_text()
    found = collectives(text, dict(mesh.shape))
    along = {(one.kind, one.axes) for one in found if one.in_loop}
    assert ("all-gather", ("fsdp",)) in along
    assert ("all-reduce", ("tensor",)) in along
    assert {axis for one in found for axis in one.axes} <= {"fsdp", "tensor"}
    reduced = sum(one.bytes for one in found if one.kind == "all-reduce" and one.axes == ("tensor",))
    assert reduced == 3 * 4 * 16 * 4  # three layers, of the [8, 16] rows those of a device
