"""MB/s of a save and a cold load of a model with Adam's moments, against raw write + fsync and read of the same bytes.

Raw is one thread that writes the arrays to a file each, syncs them and, after the page cache was told to forget them,
reads them into new arrays. Ours is `Checkpoints.save` until `wait` returns, which is when the manifest with checksums
is there, and `restore` after the cache was told to forget every file. Both take turns. `ratio` is the worse of ours
over raw, each the median of the ratios within a turn.

A virtual machine may have to ask its host for every page that was not used of late, which can take longer than the
disk and meets each side by chance. So before each timing as much memory as it may need is touched and freed.

What a save costs the loop is told twice: how long `save` keeps the caller, and how much later the step after it ends
that overwrites the state, less such a step without a save (on CPU the copy of the state is made in that time).

    python benchmarks/checkpoint_bandwidth.py [--gib 2] [--rounds 7] [--dir FOLDER]
"""

import argparse
import contextlib
import json
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxops
from jaxops.core.checkpoint import Checkpoints

FEATURES = 256


def state_of(gib: float) -> dict[str, Any]:
    """Random float32 arrays of about this size: a table, kernels and biases, thrice (parameters and two moments)."""
    rng = np.random.default_rng(0)
    rows = int(gib * 2**30 / 3 / 4 / FEATURES)
    shapes = {"table": (rows // 2, FEATURES)}
    for layer in range(4):
        shapes |= {f"kernel{layer}": (rows // 8, FEATURES), f"bias{layer}": (FEATURES,)}
    return {
        part: {name: jnp.asarray(rng.random(shape, np.float32)) for name, shape in shapes.items()}
        for part in ("params", "mu", "nu")
    }


def forget(folder: Path) -> None:
    """Everything below is on the disk and no longer in the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):  # what the advice leaves; needs root
        Path("/proc/sys/vm/drop_caches").write_text("1")


def ready(size: int) -> None:
    """Nothing is left to write to the disk, and this much memory is there, and free."""
    os.sync()
    with contextlib.closing(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def raw_write(folder: Path, arrays: list[np.ndarray]) -> None:
    folder.mkdir()
    for at, array in enumerate(arrays):
        with open(folder / str(at), "wb", buffering=0) as file:
            left = memoryview(array).cast("B")
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
    place = os.open(folder, os.O_RDONLY)
    os.fsync(place)
    os.close(place)


def raw_read(folder: Path, arrays: list[np.ndarray], into: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """Into new memory, as a load must, or into what is given."""
    found = []
    for at, like in enumerate(arrays):
        array = np.empty_like(like) if into is None else into[at]
        with open(folder / str(at), "rb", buffering=0) as file:
            left = memoryview(array).cast("B")
            while left:
                left = left[file.readinto(left) :]
        found.append(array)
    return found


def same(found: Any, state: Any) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(state)))


def raw(folder: Path, state: Any) -> dict[str, float]:
    arrays = [np.asarray(x) for x in jax.tree.leaves(state)]
    size = sum(array.nbytes for array in arrays)
    ready(size)
    write, _ = seconds(lambda: raw_write(folder / "raw", arrays))
    forget(folder)
    ready(2 * size)
    read, found = seconds(lambda: raw_read(folder / "raw", arrays))
    forget(folder)
    ready(size)
    again, _ = seconds(lambda: raw_read(folder / "raw", arrays, found))
    if not same(found, state):
        raise SystemExit("error: the raw files came back changed")
    shutil.rmtree(folder / "raw")
    return {"raw_write": write, "raw_read": read, "raw_read_into_old_memory": again}


def ours(folder: Path, state: Any) -> dict[str, float]:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    with Checkpoints(folder / "ours") as checkpoints:
        ready(3 * size)
        blocked, _ = seconds(lambda: checkpoints.save(1, state, {}))
        rest, _ = seconds(checkpoints.wait)
        forget(folder)
        ready(3 * size)
        load, found = seconds(lambda: jax.block_until_ready(checkpoints.restore(1, abstract)))
        if not same(found, state) or checkpoints.verify(1):
            raise SystemExit("error: the checkpoint came back changed")
    shutil.rmtree(folder / "ours")
    return {"save": blocked + rest, "load": load, "blocked": blocked}


def step_after(folder: Path, state: Any) -> tuple[Any, dict[str, float]]:
    """How much longer a step takes that overwrites a state of which a save has just begun."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.0001, tree), donate_argnums=0)
    ready(3 * sum(x.nbytes for x in jax.tree.leaves(state)))
    state = jax.block_until_ready(step(state))
    alone = []
    for _ in range(3):
        began = time.perf_counter()
        state = jax.block_until_ready(step(state))
        alone.append(time.perf_counter() - began)
    with Checkpoints(folder / "step") as checkpoints:
        began = time.perf_counter()
        checkpoints.save(1, state, {})
        state = jax.block_until_ready(step(state))
        took = time.perf_counter() - began
    shutil.rmtree(folder / "step")
    return state, {"step_alone": statistics.median(alone), "step_after": took - statistics.median(alone)}


def measure(folder: Path, gib: float, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Bytes, and seconds by what was done; the first round is the warm-up and is left out."""
    state = state_of(gib)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    times: dict[str, list[float]] = {}
    for at in range(rounds + 1):
        found: dict[str, float] = {}
        for side in (raw, ours) if at % 2 else (ours, raw):
            found |= side(folder, state)
        state, delay = step_after(folder, state)
        found |= delay
        if at:
            for name, value in found.items():
                times.setdefault(name, []).append(value)
            print({name: round(value, 3) for name, value in found.items()}, flush=True)
    return size, times


def file_system(folder: Path) -> str:
    """Type and source of the mount that a folder lies on, where the system tells."""
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        on = [mount for mount in mounts if folder.is_relative_to(mount[1])]
        return max(on, key=lambda mount: len(mount[1]))[2]
    return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", type=Path, default=Path())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoint_bandwidth.", dir=args.dir.resolve()) as name:
        system = file_system(Path(name))
        if system == "tmpfs":
            parser.error("--dir lies in memory (tmpfs); name a folder on a disk")
        size, times = measure(Path(name), args.gib, args.rounds)

    def within(one: str, other: str) -> list[float]:
        """The ratio of two bandwidths in each round."""
        return [b / a for a, b in zip(times[one], times[other], strict=True)]

    rate = {name: [size / 1e6 / s for s in times[name]] for name in times if "block" not in name and "step" not in name}
    per_gib = {
        name: [1e3 * s / (size / 2**30) for s in times[name]] for name in ("blocked", "step_after", "step_alone")
    }
    ratios = {"save": within("save", "raw_write"), "load": within("load", "raw_read")}
    median = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    print(
        json.dumps(
            {
                "name": "checkpoint_bandwidth",
                "ratio": min(median.values()),
                "ratios": median,
                "ratios_min_max": {name: [round(min(v), 3), round(max(v), 3)] for name, v in ratios.items()},
                "mb_per_s": {name: round(statistics.median(v)) for name, v in rate.items()},
                "mb_per_s_min_max": {name: [round(min(v)), round(max(v))] for name, v in rate.items()},
                "ms_per_gib": {name: round(statistics.median(v), 2) for name, v in per_gib.items()},
                "ms_per_gib_min_max": {name: [round(min(v), 2), round(max(v), 2)] for name, v in per_gib.items()},
                "gib": round(size / 2**30, 3),
                "rounds": args.rounds,
                "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, {system}",
                "versions": {"jax": jax.__version__, "jaxops": jaxops.__version__, "numpy": np.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
