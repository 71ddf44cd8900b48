"""Tables over two real processes: each plans for its own shards, and the run is that of one process."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from test_tables import BATCH, Trainer, batch_of

from jaxops.tables.optimizers import Adagrad

HERE = pathlib.Path(__file__).parent

WORKER = """
import json, sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
port, rank, tests = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=60)
sys.path += [tests, tests + "/.."]
from jax.experimental import multihost_utils
from test_tables import BATCH, Trainer, batch_of
from jaxops.core.rows import global_arrays, local_rows
from jaxops.tables.optimizers import Adagrad
ours = Trainer(Adagrad(lr=0.1), {"data": 8}, accumulation=4)
(start, stop), = local_rows(ours.mesh, BATCH)
place, losses = global_arrays(ours.mesh, BATCH), []
with jax.set_mesh(ours.mesh):
    for seed in range(10):
        mine = {name: x[start:stop] for name, x in batch_of(seed).items()}
        planned = place(ours.tables.plan(mine))
        ours.state, sums = jax.block_until_ready(ours.step(ours.state, planned))
        losses.append(float(sums["loss/error"].total))
rows = multihost_utils.process_allgather(ours.state.tables["item"]["rows"], tiled=True)
if rank == 0:
    at = ours.tables.specs["item"].stored(np.arange(3000))
    np.save(sys.argv[4], np.asarray(rows)[at])
    print(json.dumps(losses))
jax.distributed.shutdown()
"""


def test_two_processes_are_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Only the first process writes into a cache, so with a warm one it would wait while the other one compiles.
    cold = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(rank), str(HERE), str(tmp_path / "rows.npy")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE.parents[1],
            env=cold,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    alone = Trainer(Adagrad(lr=0.1), {"data": 8}, accumulation=4)
    assert BATCH % 32 == 0
    assert json.loads(said[0][0].splitlines()[-1]) == pytest.approx(
        [alone(batch_of(seed)) for seed in range(10)], rel=1e-5
    )
    assert np.max(np.abs(np.load(tmp_path / "rows.npy") - alone.logical()["item"])) < 1e-6
