"""Processes on CPU devices that are not ready at one time: gloo waits for 30 s where one comes alone."""

import pytest
from processes import Together

UNEQUAL = """
import optax
from pathlib import Path
import jax.numpy as jnp
from jaxops.core.compiles import forgo_cache_of_one
from jaxops.core.mesh import make_mesh
from jaxops.core.state import State
from jaxops.core.step import build_step
from jaxops.core.sums import Sum

cache = Path(sys.argv[1])
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
mesh = make_mesh(data=-1)
forgo_cache_of_one(mesh)

def objective(params, batch, key):
    time.sleep(float(sys.argv[2]) * rank)  # while it is traced, as a long compile is
    return {"loss/all": Sum(((params["w"] - batch["x"]) ** 2).sum(), jnp.float32(4))}

with jax.set_mesh(mesh):
    tx = optax.sgd(0.125)
    replicated = jax.NamedSharding(mesh, jax.P())
    params = jax.device_put({"w": np.float32(0)}, replicated)
    state = State(params, {}, {}, tx.init(params), {}, jax.device_put(np.int32(0), replicated),
                  jax.device_put(np.int32(0), replicated))
    shards = jax.NamedSharding(mesh, jax.P("data"))
    rows = np.arange(4, dtype=np.float32)
    batch = {name: jax.make_array_from_callback((4,), shards, lambda at, x=x: x[at])
             for name, x in (("x", rows), ("id", rows.astype(np.int32)))}
    state, sums = build_step(objective, tx, mesh)(state, batch)
    print(float(state.params["w"]), len(list(cache.glob("*step*"))) if cache.exists() else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 33.0])
def test_no_process_begins_before_the_others_have_compiled(tmp_path, seconds):
    """The cache, which process 0 alone would have, stays empty; the gradient is the mean over all examples."""
    with Together(UNEQUAL, tmp_path / "xla", seconds, devices=2) as processes:
        assert processes.end() == ["0.375 0\n", "0.375 0\n"]
