"""Real processes killed in mid-save: a partial checkpoint is never taken for whole, and the run goes on."""

import concurrent.futures
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxops.core.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
SIZE = (1 << 20,)  # of each of 8 arrays: 32 MiB

SAVER = """
import sys, time
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 2)
from jaxops.core.checkpoint import Checkpoints
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
place = jax.NamedSharding(mesh, jax.P("data"))
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    step = checkpoints.latest() or 0
    state = {f"w{i}": jax.device_put(jnp.full((1 << 20,), 1.0 * step), place) for i in range(8)}
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    while True:
        state, step = add(state), step + 1
        began = time.monotonic()
        print("saving", step, flush=True)
        checkpoints.save(step, state, {"cursor": 3 * step})
        state = add(add(state))  # goes on while the save is under way
        state = jax.tree.map(lambda x: x - 2, state)
        checkpoints.wait()
        print("saved", step, time.monotonic() - began, flush=True)
"""


def killed_in_mid_save(folder, chance):
    """Runs the saver, kills it at a random moment of a save; returns the last step it said was saved."""
    command = [sys.executable, "-c", SAVER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        whole = seconds = None
        for line in process.stdout:
            words = line.split()
            if words[0] == "saved":
                whole, seconds = int(words[1]), float(words[2])
            elif seconds is not None and chance.random() < 0.5:
                time.sleep(chance.uniform(0.0, 1.1 * seconds))
                process.kill()
                break
        for line in process.stdout:  # said before the kill arrived
            if line.startswith("saved") and line.endswith("\n"):
                whole = int(line.split()[1])
        assert process.wait(30) == -9
    return whole


def check(folder, whole):
    """Everything that is there is exact; what was said to be saved is there; something newer may be."""
    with Checkpoints(folder, keep=2) as checkpoints:
        warnings = []
        latest = checkpoints.latest_good(warnings.append)
        assert warnings == []
        assert latest == checkpoints.latest()
        assert latest in (whole, whole + 1)
        for step in checkpoints.steps():
            assert [p for p in checkpoints.verify(step) if not p.startswith("no checksums")] == []
            assert checkpoints.meta(step) == {"cursor": 3 * step}
            found = checkpoints.load_params(step, "")
            assert sorted(found) == [f"w{i}" for i in range(8)]
            for array in found.values():
                assert array.shape == SIZE and (array == np.float32(step)).all()
        assert whole in checkpoints.steps()


def test_killed_in_mid_save(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        whole = list(pool.map(killed_in_mid_save, folders, [random.Random(1), random.Random(2)]))
    for folder, step in zip(folders, whole, strict=True):
        check(folder, step)


@pytest.mark.slow
def test_killed_ten_times_in_mid_save(tmp_path):
    chance = random.Random(20)
    unfinished = 0
    for _ in range(10):  # each goes on where the one before was killed
        whole = killed_in_mid_save(tmp_path, chance)
        unfinished += any(not (path / "jaxops.json").exists() for path in tmp_path.iterdir())
        check(tmp_path, whole)
    assert unfinished  # otherwise no kill came at the right time, and nothing was tested
    assert len(list(tmp_path.iterdir())) <= 4  # what the kills left was swept
