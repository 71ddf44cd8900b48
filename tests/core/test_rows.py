"""The rows of a process are those its devices hold, whatever the mesh; tests/recovery has real processes."""

from unittest import mock

import jax
import numpy as np
import pytest

from jaxops.core import rows
from jaxops.core.mesh import make_mesh


def as_if(mesh, devices):
    """`local_rows` of a process that has these devices of the mesh."""
    whole = rows.batch_sharding(mesh)
    index = whole.devices_indices_map((16,))

    class Sharding:
        def addressable_devices_indices_map(self, shape):
            return {device: index[device] for device in devices}

    with (
        mock.patch.object(rows, "batch_sharding", lambda _: Sharding()),
        mock.patch.object(jax, "process_count", lambda: 2),
    ):
        return rows.local_rows(mesh, 16)


def test_one_process_takes_all():
    mesh = make_mesh(data=-1)
    assert rows.local_rows(mesh, 16) is None
    batch = {"x": np.arange(16)}
    assert rows.global_arrays(mesh, 16)(batch) is batch
    assert list(rows.local_batches([batch, batch], mesh, 16)) == [batch, batch]


@pytest.mark.parametrize(
    ("axes", "first", "second"),
    [
        ({"data": 8}, [(0, 8)], [(8, 16)]),
        ({"data": 2, "fsdp": 4}, [(0, 8)], [(8, 16)]),
        ({"data": 2, "tensor": 4}, [(0, 8)], [(8, 16)]),
        ({"tensor": 8}, [(0, 16)], [(0, 16)]),  # both hold every row: an axis spans them that does not divide a batch
    ],
)
def test_ranges_are_read_off_the_sharding(axes, first, second):
    mesh = make_mesh(**axes)
    devices = list(mesh.devices.flat)
    assert as_if(mesh, devices[:4]) == first
    assert as_if(mesh, devices[4:]) == second


def test_rows_that_are_apart_stay_apart():
    mesh = make_mesh(data=8)
    devices = list(mesh.devices.flat)
    assert as_if(mesh, [devices[0], devices[1], devices[4]]) == [(0, 4), (8, 10)]


def test_local_rows_become_the_global_array():
    mesh = make_mesh(data=4, tensor=2)
    values = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    for ranges in ([(0, 16)], [(0, 4), (4, 16)], [(0, 8), (8, 16)]):
        with mock.patch.object(rows, "local_rows", lambda *_, ranges=ranges: ranges):
            found = rows.global_arrays(mesh, 16)({"x": values})["x"]
        assert found.shape == (16, 3) and found.sharding.is_equivalent_to(rows.batch_sharding(mesh), 2)
        np.testing.assert_array_equal(found, values)


def test_evaluation_batches_are_asked_for_by_rows_where_that_is_possible():
    mesh = make_mesh(data=-1)
    asked = []

    class ByRows:
        def __len__(self):
            return 2

        def rows(self, k, start, stop):
            asked.append((k, start, stop))
            return {"x": np.arange(start, stop, dtype=np.int32) + 100 * k}

    with mock.patch.object(rows, "local_rows", lambda *_: [(0, 8), (8, 16)]):
        found = [np.asarray(batch["x"]) for batch in rows.local_batches(ByRows(), mesh, 16)]
        plain = [
            np.asarray(batch["x"]) for batch in rows.local_batches([{"x": np.arange(16, dtype=np.int32)}], mesh, 16)
        ]
    assert asked == [(0, 0, 8), (0, 8, 16), (1, 0, 8), (1, 8, 16)]
    np.testing.assert_array_equal(found, [np.arange(16), np.arange(16) + 100])
    np.testing.assert_array_equal(plain, [np.arange(16)])


def test_a_host_array_is_placed_like_another():
    mesh = make_mesh(fsdp=8)
    like = jax.device_put(np.zeros((8, 2)), jax.NamedSharding(mesh, jax.P("fsdp")))
    found = rows.put(np.arange(16.0).reshape(8, 2), like)
    assert found.sharding == like.sharding
    np.testing.assert_array_equal(found, np.arange(16.0).reshape(8, 2))


def test_one_process_gets_all_rows_back():
    mesh = make_mesh(data=4, tensor=2)
    values = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    placed = {"x": jax.device_put(values, rows.batch_sharding(mesh)), "host": [values]}
    for found in (rows.local(mesh, placed), rows.owned(mesh, placed), rows.gather_rows(mesh, 16, placed)):
        assert isinstance(found["x"], np.ndarray)
        np.testing.assert_array_equal(found["x"], values)
        np.testing.assert_array_equal(found["host"][0], values)
    assert rows.owned_rows(mesh, 16) == [(0, 16)]
    with pytest.raises(ValueError, match="has no rows"):
        rows.local(mesh, {"n": np.float32(3)})
    with pytest.raises(ValueError, match=r"float64\[3\], but process 0 owns 16 of the 16 rows"):
        rows.gather_rows(mesh, 16, np.zeros(3))


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "tensor": 4}, {"tensor": 8}, {"data": 4, "tensor": 2}])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [8, 24])
def test_every_row_has_one_owner_that_holds_it(axes, processes, size):
    mesh = make_mesh(**axes)
    index = rows.batch_sharding(mesh).devices_indices_map((size,))
    of = {device: mock.Mock(process_index=at * processes // 8) for at, device in enumerate(mesh.devices.flat)}

    class Sharding:
        def devices_indices_map(self, shape):
            return {of[device]: slices for device, slices in index.items()}

    with mock.patch.object(rows, "batch_sharding", lambda _: Sharding()):
        owned = {rank: rows.owned_rows(mesh, size, rank) for rank in range(processes)}
    held = {rank: set() for rank in range(processes)}
    for device, slices in index.items():
        held[of[device].process_index] |= set(range(*slices[0].indices(size)))
    numbers = {rank: [n for start, stop in ranges for n in range(start, stop)] for rank, ranges in owned.items()}
    assert sorted(n for each in numbers.values() for n in each) == list(range(size))
    assert all(set(each) <= held[rank] for rank, each in numbers.items())
    assert {len(each) for each in numbers.values()} == {size // processes}
