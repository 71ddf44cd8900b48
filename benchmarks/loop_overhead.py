"""Microseconds a step that the loop adds to the bare jitted step, on a tiny model, in one process.

The bare step is called in a plain Python loop on a batch that is already on the device. The loop reads numpy batches,
accumulates metrics, fetches them every 50 steps and writes them. Blocks of both alternate; medians are compared.

    python benchmarks/loop_overhead.py [--blocks 15] [--steps 1000]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxops
from jaxops.core.loop import Window, run_loop
from jaxops.core.mesh import batch_sharding, make_mesh
from jaxops.core.step import build_step, init_state
from jaxops.core.sums import Sum
from jaxops.core.writers import JsonlWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    mesh = make_mesh(devices=jax.devices()[:1])
    tx = optax.sgd(0.1)

    def objective(params, batch, key):
        error = batch["x"] @ params["w"] - batch["y"]
        return {"loss/mse": Sum.of(jnp.square(error))}

    def init(key):
        return {"w": jax.random.normal(key, (16, 8))}

    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(8, 16)).astype(np.float32),
        "y": rng.normal(size=(8, 8)).astype(np.float32),
    }
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        step = build_step(objective, tx, mesh)
        writer = JsonlWriter(Path(folder) / "metrics.jsonl")
        placed = jax.device_put(batch, batch_sharding(mesh))

        def fresh():
            return init_state(init, jax.random.key(0), tx, mesh, [])

        def bare() -> float:
            state = fresh()
            program = step.programs(state, placed)[0].fn
            window = step.empty_window(state, placed)
            state, window = program(state, placed, window)
            began = time.perf_counter()
            for _ in range(args.steps):
                state, window = program(state, placed, window)
            jax.block_until_ready(window)
            return (time.perf_counter() - began) / args.steps * 1e6

        def forever(each):
            while True:
                yield each

        def on_window(window: Window):
            values = window.values(8, {})
            writer.write(window.last, {k: v for k, v in values.items() if isinstance(v, float)})
            return values

        def loop(each) -> float:
            state, window = step(fresh(), each)
            jax.block_until_ready(window)
            began = time.perf_counter()
            run_loop(
                step,
                state,
                forever(each),
                mesh,
                start=0,
                cursor=0,
                steps=args.steps,
                batch_size=8,
                on_window=on_window,
            )
            return (time.perf_counter() - began) / args.steps * 1e6

        times: dict[str, list[float]] = {"bare": [], "loop_numpy": [], "loop_device": []}
        for block in range(args.blocks + 1):
            each = {"bare": bare(), "loop_numpy": loop(batch), "loop_device": loop(placed)}
            if block:  # the first is the warm-up
                for name, value in each.items():
                    times[name].append(value)
        writer.close()
    median = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: [round(min(values), 1), round(max(values), 1)] for name, values in times.items()}
    paired = [loop - bare for loop, bare in zip(times["loop_numpy"], times["bare"], strict=True)]
    print(
        json.dumps(
            {
                "name": "loop_overhead",
                "ratio": round(median["bare"] / median["loop_numpy"], 3),
                "overhead_us": round(statistics.median(paired), 2),
                "overhead_us_batch_on_device": round(median["loop_device"] - median["bare"], 2),
                "us_per_step": {name: round(value, 2) for name, value in median.items()},
                "min_max_us": spread,
                "versions": {"jax": jax.__version__, "jaxops": jaxops.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
