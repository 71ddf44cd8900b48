"""Made-up completions for tests of losses and advantages: masks of every form, and arrays beside them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH, LONGEST = 8, 9


def masks(rng, batch=BATCH, longest=LONGEST):
    """Masks: whole, all masked, one token, a tool's tokens inside, the last column alone, and ragged ones."""
    mask = (np.arange(longest) < rng.integers(1, longest + 1, (batch, 1))).astype(np.float32)
    mask[0], mask[1], mask[2], mask[3], mask[4] = 1, 0, 0, 1, 0
    mask[2, 0], mask[4, -1] = 1, 1
    mask[3, 2:5] = mask[3, 7] = 0
    return mask


def arrays(rng, *names, batch=BATCH, longest=LONGEST):
    """Normal arrays by name."""
    return {name: rng.normal(0, 1, (batch, longest)).astype(np.float32) for name in names}


def sharded(*given):
    """The arrays with their rows over eight devices."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    return [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in given]


def wider(x, by=5, value=np.nan):
    """The array with so many more columns, that hold what must not be read."""
    return jnp.pad(jnp.asarray(x), ((0, 0), (0, by)), constant_values=value)


def close(mine, theirs, tolerance=3e-6):
    np.testing.assert_allclose(np.asarray(mine, np.float64), theirs, rtol=tolerance, atol=tolerance)
