"""Rows of global arrays on real processes: each gets its own back, owns each row once, and all get all of them."""

import json

import pytest
from processes import Together

CODE = """
from jaxops.core import rows
from jaxops.core.mesh import batch_sharding, make_mesh
mesh = make_mesh(**json.loads(sys.argv[1]))
size = 8
whole = {"x": np.arange(size * 3, dtype=np.float32).reshape(size, 3), "ids": np.arange(size, dtype=np.int32)}
ranges = rows.local_rows(mesh, size) or [(0, size)]
numbers = np.concatenate([np.arange(*each) for each in ranges])
mine = {name: x[numbers] for name, x in whole.items()}
batch = rows.global_arrays(mesh, size)(mine)
if jax.process_count() == 1:
    batch = jax.device_put(batch, batch_sharding(mesh))
for name, x in rows.local(mesh, batch).items():
    assert isinstance(x, np.ndarray) and x.dtype == whole[name].dtype
    np.testing.assert_array_equal(x, mine[name])
# over a tensor axis too, where this process has the whole of its rows; and the same everywhere
spec = jax.P(batch_sharding(mesh).spec[0], "tensor")
split = jax.make_array_from_callback((size, 4), jax.NamedSharding(mesh, spec), lambda i: np.ones((size, 4))[i])
try:
    found = rows.local(mesh, split)
    assert found.shape == (len(numbers), 4) and (found == 1).all()
    split = "whole"
except ValueError as error:
    assert "only the leading dimension may be divided over processes" in str(error), error
    split = "refused"
same = jax.make_array_from_callback((size,), jax.NamedSharding(mesh, jax.P()), lambda i: whole["ids"][i])
for everywhere in (same, whole["ids"]):
    np.testing.assert_array_equal(rows.local(mesh, everywhere), mine["ids"])
owned = rows.owned(mesh, batch)
scores = {"score": owned["ids"] * np.pi, "late": owned["ids"] % 3 == 1, "text": owned["x"][:, :2]}
found = rows.gather_rows(mesh, size, scores, "scores")
assert found["score"].dtype == np.float64 and found["late"].dtype == bool
np.testing.assert_array_equal(found["score"], np.arange(size) * np.pi)
np.testing.assert_array_equal(found["late"], np.arange(size) % 3 == 1)
np.testing.assert_array_equal(found["text"], whole["x"][:, :2])
odd = rows.gather_rows(mesh, size, np.zeros((len(owned["ids"]), 0), np.float32))
assert odd.shape == (size, 0)
try:
    rows.gather_rows(mesh, size, np.zeros(99))
except ValueError as error:
    assert "of the 8 rows" in str(error)
print(json.dumps({"held": numbers.tolist(), "owned": owned["ids"].tolist(), "split": split}))
"""


def asked(count: int, devices: int, **mesh: int) -> list[dict]:
    with Together(CODE, json.dumps(mesh), count=count, devices=devices) as job:
        return [json.loads(out.splitlines()[-1]) for out in job.end()]


def assert_owned_once(found: list[dict]) -> None:
    assert sorted(row for each in found for row in each["owned"]) == list(range(8))
    assert all(set(each["owned"]) <= set(each["held"]) for each in found)


def test_a_tensor_axis_across_two_processes():
    found = asked(2, 1, tensor=2)
    assert [each["held"] for each in found] == [list(range(8))] * 2
    assert [each["owned"] for each in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [each["split"] for each in found] == ["refused"] * 2
    assert_owned_once(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (1, 4, {"data": 2, "tensor": 2}),
        (2, 1, {"data": 2}),
        (2, 2, {"data": 2, "tensor": 2}),
        (2, 2, {"tensor": 4}),
        (4, 1, {"data": 2, "tensor": 2}),
        (4, 1, {"tensor": 4}),
        (4, 2, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_each_row_is_owned_once_by_one_that_holds_it(count, devices, mesh):
    found = asked(count, devices, **mesh)
    assert_owned_once(found)
    assert {len(each["owned"]) for each in found} == {8 // count}
    spans = mesh.get("tensor", 1) > devices  # then a process has only a part of what is divided over it
    assert {each["split"] for each in found} == {"refused" if spans else "whole"}
