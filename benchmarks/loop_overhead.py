"""Microseconds a step that the loop adds to the bare jitted step, on a tiny model, in one process.

Like is compared with like: the loop over numpy batches with the bare step called on the same numpy batch, so that both
pay for its transfer to the device, and both again with a batch that lies there already. The bare step is called in a
plain Python loop; the loop accumulates metrics as well, fetches them every 50 steps and writes them.

Short blocks of all four take turns, so that what else the machine does meets all alike. An overhead is the median of
the differences within a turn; `least_overhead_us` is that between the quickest blocks of each, which a busy machine
disturbs less.

`stop` is another matter: seconds from SIGTERM to a saved checkpoint, with steps of about half a second of real work on
the device, and the same in steps. It is measured on one device and on eight (virtual, in a process of their own).

    python benchmarks/loop_overhead.py [--blocks 200] [--steps 250] [--stops 3]
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxops
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.fresh_state import init_state
from jaxops.core.interrupt import Interrupt
from jaxops.core.loop import Window, run_loop
from jaxops.core.mesh import batch_sharding, make_mesh
from jaxops.core.metrics_file import JsonlWriter
from jaxops.core.step import build_step
from jaxops.core.sums import Sum

ROWS, FEATURES, TARGETS = 8, 16, 8
WINDOW = 50
STEP_SECONDS = 0.5


def objective(params, batch, key):
    """Least squares: the smallest step there is."""
    error = batch["x"] @ params["w"] - batch["y"]
    return {"loss/mse": Sum.of(jnp.square(error))}


def init(key):
    return {"w": jax.random.normal(key, (FEATURES, TARGETS))}


def measure(steps: int, blocks: int, folder: Path) -> dict[str, list[float]]:
    """Microseconds a step in each block, by what was called and where its batch lay."""
    mesh, tx = make_mesh(devices=jax.devices()[:1]), optax.sgd(0.1)
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(ROWS, FEATURES)).astype(np.float32),
        "y": rng.normal(size=(ROWS, TARGETS)).astype(np.float32),
    }
    with jax.set_mesh(mesh):
        step = build_step(objective, tx, mesh)
        writer = JsonlWriter(folder / "metrics.jsonl")
        start = init_state(init, jax.random.key(0), tx, mesh, [])

        def per_step(run: Callable[[Any, Any], Any], each: Any) -> float:
            """Of `run(state, window)`, which has taken one step before the clock begins."""
            state, window = step(jax.tree.map(jnp.copy, start), each)
            jax.block_until_ready(window)
            began = time.perf_counter()
            jax.block_until_ready(run(state, window))
            return (time.perf_counter() - began) / steps * 1e6

        def bare(each: Any) -> float:
            program = step.programs(start, each)[0].fn

            def run(state, window):
                for _ in range(steps):
                    state, window = program(state, each, window)
                return window

            return per_step(run, each)

        def on_window(window: Window) -> dict[str, Any]:
            values = window.values({})
            writer.write(window.last, {k: v for k, v in values.items() if isinstance(v, float)})
            return values

        def loop(each: Any) -> float:
            def run(state, window):
                del window
                ended = run_loop(
                    step,
                    state,
                    lambda cursor, size: each,
                    mesh,
                    start=0,
                    cursor=0,
                    steps=steps,
                    batch_size=ROWS,
                    window=WINDOW,
                    on_window=on_window,
                )
                return ended.state

            return per_step(run, each)

        batches = {"numpy": batch, "device": jax.device_put(batch, batch_sharding(mesh))}
        kinds = {"bare": bare, "loop": loop}
        times: dict[str, list[float]] = {f"{kind}_{where}": [] for kind in kinds for where in batches}
        turns = [(where, kind) for where in batches for kind in kinds]
        for block in range(blocks + 1):
            for where, kind in turns if block % 2 else reversed(turns):
                found = kinds[kind](batches[where])
                if block:  # the first is the warm-up
                    times[f"{kind}_{where}"].append(found)
        writer.close()
    return times


def slow_objective(trips: int):
    """Least squares after `trips` products of large matrices, which the answer needs but hardly notices."""

    def objective(params, batch, key):
        square = jnp.eye(512) + 1e-6 * params["w"][0, 0]
        square = jax.lax.fori_loop(0, trips, lambda _, x: x @ x, jax.lax.stop_gradient(square))
        error = batch["x"] @ params["w"] - batch["y"] + 1e-9 * square[0, 0]
        return {"loss/mse": Sum.of(jnp.square(error))}

    return objective


def seconds_to_stop(devices: int, stops: int) -> dict[str, Any]:
    """From SIGTERM to a saved checkpoint: the median, in seconds and in steps, and the step that it was measured by."""
    mesh, tx = make_mesh(data=devices, devices=jax.devices()[:devices]), optax.sgd(0.1)
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(ROWS, FEATURES)).astype(np.float32),
        "y": rng.normal(size=(ROWS, TARGETS)).astype(np.float32),
    }
    with jax.set_mesh(mesh):

        def timed(step, steps: int) -> float:
            state, window = step(init_state(init, jax.random.key(0), tx, mesh, []), batch)
            jax.block_until_ready(window)
            began = time.perf_counter()
            for _ in range(steps):
                state, window = jax.block_until_ready(step(state, batch, window))
            return (time.perf_counter() - began) / steps

        trips = 20
        while (took := timed(build_step(slow_objective(trips), tx, mesh), 2)) < STEP_SECONDS / 2:
            trips = max(int(trips * min(STEP_SECONDS / took, 10)), trips + 1)
        step = build_step(slow_objective(trips), tx, mesh)
        found = []
        for stop in range(stops):
            interrupt, asked = Interrupt(), [0.0]

            def ask(asked: list[float] = asked) -> None:
                asked[0] = time.perf_counter()
                os.kill(os.getpid(), signal.SIGTERM)

            each = timed(step, 3)
            timer = threading.Timer(each * (6 + stop / stops), ask)
            with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints, interrupt.installed():
                state = init_state(init, jax.random.key(0), tx, mesh, [])
                timer.start()
                ended = run_loop(
                    step,
                    state,
                    lambda cursor, size: batch,
                    mesh,
                    start=0,
                    cursor=0,
                    steps=10**6,
                    batch_size=ROWS,
                    window=WINDOW,
                    poll=interrupt,
                )
                checkpoints.save(ended.step, ended.state, {"cursor": ended.cursor}, wait=True)
                seconds = time.perf_counter() - asked[0]
            found.append((seconds, seconds / each, each))
    seconds, steps, each = (round(statistics.median(column), 2) for column in zip(*found, strict=True))
    return {"seconds": seconds, "steps": steps, "most_steps": round(max(f[1] for f in found), 2), "step_s": each}


def stop_on(devices: int, stops: int) -> dict[str, Any]:
    """`seconds_to_stop` in a process of its own, with that many virtual devices."""
    command = [sys.executable, __file__, "--stops", str(stops), "--stop-on", str(devices)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--stops", type=int, default=3, help="how often a run is stopped; 0 leaves it out")
    parser.add_argument("--stop-on", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stop_on:
        jaxops.use_cpu_devices(args.stop_on)
        print(json.dumps(seconds_to_stop(args.stop_on, args.stops)))
        return
    with tempfile.TemporaryDirectory() as folder:
        times = measure(args.steps, args.blocks, Path(folder))

    def overhead(where: str) -> float:
        pairs = zip(times[f"loop_{where}"], times[f"bare_{where}"], strict=True)
        return round(statistics.median(loop - bare for loop, bare in pairs), 2)

    median = {name: round(statistics.median(values), 2) for name, values in times.items()}
    print(
        json.dumps(
            {
                "name": "loop_overhead",
                "ratio": round(median["bare_numpy"] / median["loop_numpy"], 3),
                "overhead_us": overhead("numpy"),
                "overhead_device_us": overhead("device"),
                "least_overhead_us": {
                    where: round(min(times[f"loop_{where}"]) - min(times[f"bare_{where}"]), 2)
                    for where in ("numpy", "device")
                },
                "us_per_step": median,
                "stop": {f"{n} devices": stop_on(n, args.stops) for n in (1, 8)} if args.stops else None,
                "min_max_us": {name: [round(min(v), 1), round(max(v), 1)] for name, v in times.items()},
                "versions": {"jax": jax.__version__, "jaxops": jaxops.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
