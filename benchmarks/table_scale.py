"""A table of 20 million rows on eight CPU devices: resident memory against the prediction, and the pace of its steps.

Predicted are the bytes of rows and slots that `EmbeddingTables.bytes_per_device` tells, times the devices; measured is
how much more memory the process holds after the steps than before the table was made, and at the most. `ratio` is
predicted over measured: 1 is as predicted, below 1 we hold more.

    python benchmarks/table_scale.py [--rows 20000000] [--dim 32] [--steps 200]
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxops
from jaxops.core.fresh_state import init_state
from jaxops.core.mesh import make_mesh, use_cpu_devices
from jaxops.core.step import build_step
from jaxops.core.sums import Sum
from jaxops.tables.optimizers import RowwiseAdagrad
from jaxops.tables.spec import TableSpec
from jaxops.tables.tables import EmbeddingTables

BATCH, LENGTH = 1024, 8


def resident() -> int:
    """Bytes that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def batch_of(seed: int, rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "ids": (rng.zipf(1.2, (BATCH, LENGTH)) * 7919 % rows).astype(np.int32),
        "y": rng.standard_normal(BATCH).astype(np.float32),
        "weight": np.ones(BATCH, np.float32),
        "id": np.arange(BATCH, dtype=np.int32),
    }


def objective(params: Any, batch: Any, key: Any) -> dict[str, Sum]:
    bags = batch["rows"]["ids"].sum(1)
    return {"loss/e": Sum.of((jnp.tanh(bags @ params["w"]) - batch["y"]) ** 2, batch["weight"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 20_000_000), ("dim", 32), ("steps", 200), ("devices", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    use_cpu_devices(args.devices)
    mesh, tx, rules = make_mesh(data=args.devices), optax.sgd(0.05), [(".*", ())]
    spec = TableSpec(rows=args.rows, dim=args.dim, features=("ids",), optimizer=RowwiseAdagrad())
    with jax.set_mesh(mesh):
        tables = EmbeddingTables({"table": spec}, mesh, batch_of(0, args.rows))
        init = lambda key: {"w": jax.random.normal(key, (args.dim,))}
        jax.block_until_ready(init(jax.random.key(0)))
        before = resident()
        began = time.perf_counter()
        state = jax.block_until_ready(init_state(init, jax.random.key(0), tx, mesh, rules, tables=tables))
        made = time.perf_counter() - began
        step = build_step(objective, tx, mesh, tables=tables, rules=rules)
        times, held, passes = [], [], 0.0
        for seed in range(args.steps):
            batch = tables.plan(batch_of(seed, args.rows))
            began = time.perf_counter()
            state, sums = jax.block_until_ready(step(state, batch))
            times.append(time.perf_counter() - began)
            held.append(resident() - before)
            passes = max(passes, float(sums["tables/table/passes"].maximum))
    predicted = sum(tables.bytes_per_device().values()) * args.devices
    print(
        json.dumps(
            {
                "name": "table_scale",
                "ratio": round(predicted / held[-1], 3),
                "predicted_mib": round(predicted / 2**20),
                "held_mib": {"after": round(held[-1] / 2**20), "most_at_a_step": round(max(held) / 2**20)},
                "peak_of_process_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
                "seconds_to_make": round(made, 1),
                "step_ms": {"median": round(1e3 * statistics.median(times), 1), "most": round(1e3 * max(times), 1)},
                "passes_most": passes,
                "steps": args.steps,
                "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
                "versions": {"jax": jax.__version__, "jaxops": jaxops.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
