"""The state that training begins with: fresh parameters on the mesh, the optimizer's state, tables and extras.

Tested in tests/core/test_step.py.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxops.core.sharding import Rule, parameter_shardings
from jaxops.core.state import Params, State, split
from jaxops.core.step import Extra, Tables
from jaxops.core.weights import cast_by_path


def init_state(
    init: Callable[[Array], Params],
    key: Array,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: list[Rule],
    *,
    frozen: tuple[str, ...] = (),
    tables: Tables | None = None,
    extras: Mapping[str, Extra] | None = None,
    dtype: Any = jnp.float32,
    dtypes: Sequence[tuple[str, Any]] = (),
) -> State:
    """Creates a fresh state on the mesh, with parameters sharded by the rules.

    Args:
      init: returns fresh parameters for a key.
      key: the key that all random initial values are drawn from.
      tx: the optimizer; its state is made for the trained parameters, and is sharded as they are.
      mesh: the mesh that all arrays are placed on.
      rules: sharding rules, (path pattern, mesh axes of each dimension).
      frozen: path patterns of parameters that are held out of training.
      tables: embedding tables.
      extras: further entries of the state, by name.
      dtype: the dtype of the parameters.
      dtypes: (path pattern, dtype) of parameters with another dtype (float32 adapters over a bfloat16 base).

    Raises:
      UserError: the rules or `frozen` do not fit the parameters (`sharding.place`, `state.split`).

    Example:
      mesh = jaxops.make_mesh(data=-1)
      state = jaxops.init_state(init, jax.random.key(0), optax.adam(1e-3), mesh, [("kernel$", ("fsdp", "tensor"))])
    """
    shapes = jax.eval_shape(init, key)
    where = parameter_shardings(shapes, rules, mesh)
    # Under jax.eval_shape the caller has set the mesh, and jax refuses to set it again.
    with contextlib.nullcontext() if isinstance(key, jax.core.Tracer) else jax.set_mesh(mesh):
        # Initialisers know nothing of shardings: they run with auto axes, and the rules type their results.
        specs = jax.tree.map(lambda s: s.spec, where)
        made = jax.jit(jax.sharding.auto_axes(lambda k: cast_by_path(init(k), dtypes, dtype), out_sharding=specs))(key)
        params, held = split(made, frozen)

        def rest(params: Params) -> tuple[PyTree, dict[str, PyTree]]:
            with jax.numpy_dtype_promotion("standard"):
                return tx.init(params), {name: extra.init(params) for name, extra in (extras or {}).items()}

        opt_state, extra = jax.jit(rest)(params)
        rows = tables.init(jax.random.fold_in(key, 1)) if tables else {}
        step, updates = (jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, P())) for _ in range(2))
        # jit leaves arrays that depend on no parameter (counters) on one device
        opt_state, extra = jax.tree.map(lambda x: _on_mesh(x, mesh), (opt_state, extra))
    return State(params, held, rows, opt_state, extra, step, updates)


def _on_mesh(x: Array, mesh: Mesh) -> Array:
    if jax.typeof(x).sharding.mesh == mesh.abstract_mesh:
        return x
    return jax.device_put(x, NamedSharding(mesh, P()))


def abstract_state(state: State) -> State:
    """Returns the state's shapes, dtypes and shardings without its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
