"""Two real processes save together; one process restores, and two again."""

import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from object_stores import needs_moto, s3  # noqa: F401 (fixture)

from jaxops.core.checkpoint import Checkpoints
from jaxops.core.fingerprint import fingerprint

ROOT = pathlib.Path(__file__).parents[2]

WORKER = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=60)
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import RunFailed, UserError
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
whole = np.arange(64, dtype=np.float32).reshape(8, 8)
make = lambda x, spec: jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec), lambda i: x[i])
frozen = lambda s: {"split": make(whole - (s > 3), jax.P("data")), "same": make(whole + (s > 3), jax.P())}
state = lambda s: {"split": make(whole * s, jax.P("data")), "same": make(whole + s, jax.P()), "frozen": frozen(s)}
warnings = []
with Checkpoints(folder, keep=2, best="hr") as checkpoints:
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state(step), {"cursor": step}, {"hr": -abs(step - 2)})
    assert checkpoints.best() == 2, checkpoints.best()  # all processes see the last save whole
    assert checkpoints.steps() == [2, 3, 4], checkpoints.steps()
    checkpoints.save(2, state(9), {"cursor": 9}, {"hr": 5.0})
    assert checkpoints.latest() == checkpoints.latest_good(warnings.append) == 2
    found = checkpoints.restore(2, state(0))
    for shard in found["split"].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index] * 9)
    for shard in found["frozen"]["split"].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index] - 1)
    if rank == 0:
        from jaxops.core import manifest
        write, manifest.write = manifest.write, lambda *_: 1 / 0
    checkpoints.save(5, state(5), {})
    try:
        checkpoints.wait()
        raise SystemExit("no error")
    except RunFailed as error:
        print(rank, error)
jax.distributed.shutdown()
"""


def together(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), str(port), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        return [(*process.communicate(timeout=120), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", pytest.param("store", marks=needs_moto)])
def test_two_processes_save_and_agree(tmp_path, request, place):
    folder = tmp_path if place == "folder" else f"{request.getfixturevalue('s3')}/checkpoints"
    (out0, err0, code0), (out1, err1, code1) = together(folder)
    assert code0 == code1 == 0, err0 + err1
    assert "failed: ZeroDivisionError" in out0
    assert "failed on process 0" in out1
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [2, 4]  # the two saved last
        whole = np.arange(64, dtype=np.float32).reshape(8, 8)
        alone = {("frozen", "split"): whole - 1, ("frozen", "same"): whole + 1}
        for step, value in ((2, 9), (4, 4)):
            assert checkpoints.verify(step) == []
            found = checkpoints.load_params(step, "")
            np.testing.assert_array_equal(found["split"], whole * value)
            np.testing.assert_array_equal(found["same"], whole + value)
            np.testing.assert_array_equal(found["frozen"]["split"], whole - 1)
            np.testing.assert_array_equal(found["frozen"]["same"], whole + 1)
        # Steps 1 to 3 had another base, which went with the last of them; both processes found one fingerprint.
        (name,) = checkpoints._folder.shared.names()
        assert name == f"frozen-{fingerprint(alone)[:16]}"
