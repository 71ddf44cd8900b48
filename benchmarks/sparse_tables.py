"""A training step of an embedding table that never sees a dense gradient, against the dense table under optax.

The model sums bags of looked-up rows, multiplies them by a weight and squares the error: nearly all of the time is the
table's. Both sides run element-wise Adagrad and take turns on the same Zipf ids; so does torch's EmbeddingBag with
sparse gradients and Adagrad, in a process of its own, where `.peers/recbole` has a torch (`make peers`). A turn is a
rest, until the other side's threads have stopped spinning, and then steps one after the other, as in training; the
first ones are not counted, as they find caches and clocks as the rest left them. `ratio` is a dense step's time over
ours, the median of the ratios within a turn, at 1M x 64 and 8,192 ids.
Our plan is made on the host, in the input workers, and is told apart; the comparison with torch counts it, because
torch sorts in its step.

    python benchmarks/sparse_tables.py [--turns 13] [--quick]
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxops
from jaxops.core.fresh_state import init_state
from jaxops.core.mesh import make_mesh
from jaxops.core.step import build_step
from jaxops.core.sums import Sum
from jaxops.tables.optimizers import Adagrad, RowwiseAdagrad, TableOptimizer
from jaxops.tables.spec import TableSpec
from jaxops.tables.tables import EmbeddingTables

LENGTH, ZIPF = 8, 1.2
REST, STEPS, WARM, LONGEST = 0.3, 25, 5, 3.0
"""A turn: seconds of rest, steps, how many of these are not counted, and the seconds after which it may end earlier."""
TORCH = Path(".peers/recbole/bin/python")
RULES: list[Any] = [(".*", ())]


def batches(rows: int, ids: int, count: int) -> list[dict[str, np.ndarray]]:
    """Ids of Zipf's law with this exponent, scattered over the table."""
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(rows)
    weight = np.cumsum(1 / np.arange(1, rows + 1) ** ZIPF)
    size = ids // LENGTH
    made = []
    for _ in range(count):
        drawn = np.searchsorted(weight, rng.random((size, LENGTH)) * weight[-1])
        made.append(
            {
                "ids": shuffled[np.minimum(drawn, rows - 1)].astype(np.int32),
                "y": rng.standard_normal(size).astype(np.float32),
                "weight": np.ones(size, np.float32),
                "id": np.arange(size, dtype=np.int32),
            }
        )
    return made


def loss(bags: jax.Array, w: jax.Array, batch: Any) -> dict[str, Sum]:
    return {"loss/e": Sum.of((jnp.tanh(bags.sum(1) @ w) - batch["y"]) ** 2, batch["weight"])}


class Side:
    """A step that is called on batches; `seconds` of each, and the temporaries of its program."""

    def __init__(self, rows: int, dim: int, optimizer: TableOptimizer | None, first: dict[str, np.ndarray]):
        mesh = make_mesh(devices=jax.devices()[:1])
        tables = None
        if optimizer is not None:
            spec = TableSpec(rows=rows, dim=dim, features=("ids",), optimizer=optimizer, placement="row")
            tables = EmbeddingTables({"table": spec}, mesh, first)

        def init(key: jax.Array) -> dict[str, jax.Array]:
            params = {"w": jax.random.normal(key, (dim,)) * 0.1}
            return params if tables else params | {"table": jax.random.normal(key, (rows, dim)) * 0.01}

        def objective(params: Any, batch: Any, key: Any) -> dict[str, Sum]:
            found = batch["rows"]["ids"] if tables else params["table"][batch["ids"]]
            return loss(found, params["w"], batch)

        tx = optax.sgd(0.05) if tables else optax.adagrad(0.05)
        self.mesh, self.tables = mesh, tables
        self.sums: Any = None  # of the steps before, as in a window of the loop
        self.plan: Callable[[Any], Any] = tables.plan if tables else lambda batch: batch
        with jax.set_mesh(mesh):
            self.state = init_state(init, jax.random.key(0), tx, mesh, RULES, tables=tables)
            self.step = build_step(objective, tx, mesh, tables=tables, rules=RULES)
            program = self.step.programs(self.state, self.plan(first))[0]
            self.temporaries = program.fn.lower(*program.args).compile().memory_analysis().temp_size_in_bytes

    def __call__(self, batch: dict[str, np.ndarray]) -> tuple[float, float]:
        """Seconds to plan, and to step."""
        began = time.perf_counter()
        planned = self.plan(batch)
        between = time.perf_counter()
        with jax.set_mesh(self.mesh):
            self.state, self.sums = jax.block_until_ready(self.step(self.state, planned, self.sums))
        took = between - began, time.perf_counter() - between
        if float(self.sums["nonfinite"].total):
            raise SystemExit("error: a step was not finite")
        return took


class Torch:
    """The peer's process; a step for each batch."""

    def __init__(self, rows: int, dim: int, ids: int, folder: Path):
        words = {"rows": rows, "dim": dim, "batch": ids // LENGTH, "length": LENGTH, "threads": os.cpu_count()}
        command = [str(TORCH), "benchmarks/peers/torch_embedding.py"]
        command += [word for name, value in words.items() for word in (f"--{name}", str(value))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder = folder
        self.version = self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __call__(self, batch: dict[str, np.ndarray]) -> float:
        path = self.folder / "batch.npz"
        np.savez(path, ids=batch["ids"], y=batch["y"])
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def turn(side: Callable[[Any], Any], made: list[dict[str, np.ndarray]]) -> tuple[float, float]:
    """Median seconds of a step, without and with its plan, once it is warm."""
    time.sleep(REST)
    took, began = [], time.perf_counter()
    for batch in made:
        took.append(side(batch))
        if len(took) >= 3 and time.perf_counter() - began > LONGEST:
            break
    counted = took[min(WARM, len(took) // 3) :]
    pairs = [one if isinstance(one, tuple) else (0.0, one) for one in counted]
    return statistics.median(step for _, step in pairs), statistics.median(sum(pair) for pair in pairs)


def in_turns(
    sides: dict[str, Callable[[Any], Any]], made: list[dict[str, np.ndarray]], turns: int
) -> dict[str, list[float]]:
    """Seconds of a step by side, and `NAME+plan` with its plan, of each turn."""
    times: dict[str, list[float]] = {}
    for at in range(turns + 1):
        for name, side in sides.items():
            step, planned = turn(side, made[STEPS * at : STEPS * (at + 1)])
            if at:  # the first turn compiles and fills pages
                times.setdefault(name, []).append(step)
                times.setdefault(f"{name}+plan", []).append(planned)
    return times


def measure(rows: int, dim: int, ids: int, turns: int, folder: Path) -> dict[str, Any]:
    made = batches(rows, ids, STEPS * (turns + 1))
    adagrad, rowwise = Side(rows, dim, Adagrad(), made[0]), Side(rows, dim, RowwiseAdagrad(), made[0])
    sides = {"adagrad": adagrad, "rowwise_adagrad": rowwise, "dense": Side(rows, dim, None, made[0])}
    temporaries = {name: round(side.temporaries / (rows * dim * 4), 4) for name, side in sides.items()}
    times = in_turns(sides, made, turns)
    # Torch has turns with ours alone: after a dense step, which goes through all memory, its steps take twice as long,
    # and beside the dense table there would be no room for its own.
    del sides, rowwise
    gc.collect()
    torch = Torch(rows, dim, ids, folder) if TORCH.exists() else None
    beside = in_turns({"adagrad": adagrad, "torch": torch}, made, turns) if torch else {}
    if torch:
        torch.close()

    def ratio(one: str, other: str, times: dict[str, list[float]]) -> list[float]:
        found = sorted(b / a for a, b in zip(times[one], times[other], strict=True))
        return [round(x, 2) for x in (statistics.median(found), found[0], found[-1])]

    out: dict[str, Any] = {
        "rows": rows,
        "dim": dim,
        "ids": ids,
        "distinct": len(np.unique(made[0]["ids"])),
        "ms": milliseconds(times),
        "temporaries_of_table": temporaries,
        "dense_over_ours": {
            name: ratio(name, "dense", times) for name in ("adagrad", "adagrad+plan", "rowwise_adagrad")
        },
    }
    if torch:
        out["torch"] = torch.version
        out["ms_beside_torch"] = milliseconds(beside)
        out["torch_over_ours"] = {name: ratio(name, "torch", beside) for name in ("adagrad", "adagrad+plan")}
    return out


def milliseconds(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians."""
    return {name: round(1e3 * statistics.median(x), 2) for name, x in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=13)
    parser.add_argument("--quick", action="store_true", help="the first size alone")
    args = parser.parse_args()
    found = []
    sizes = [(10**6, 64, 8192), (10**6, 64, 65536), (10**7, 64, 8192)]
    with tempfile.TemporaryDirectory() as folder:
        for rows, dim, ids in sizes[:1] if args.quick else sizes:
            found.append(measure(rows, dim, ids, args.turns, Path(folder)))
            print(json.dumps(found[-1]), flush=True)
    print(
        json.dumps(
            {
                "name": "sparse_tables",
                "ratio": found[0]["dense_over_ours"]["adagrad"][0],
                "sizes": found,
                "turns": args.turns,
                "steps_of_a_turn": STEPS,
                "warm_up_of_a_turn": WARM,
                "rest_seconds": REST,
                "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
                "versions": {"jax": jax.__version__, "jaxops": jaxops.__version__, "optax": optax.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
