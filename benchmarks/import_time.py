"""Seconds until `import jaxops` is done, beside `import jax, flax, optax`, and until `jaxops --help` has printed.

`import jaxops` loads names when they are used. So the imports are measured twice: as they stand, and with every public
name loaded, which a program that trains pays in any case. Each is a process of its own, and they take turns; CPU time
is kept beside wall time, which on a busy machine is that of the queue for the cores.

    python benchmarks/import_time.py [--turns 7]
"""

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import time

PROGRAMS = {
    "nothing": ["-c", "pass"],
    "jax_flax_optax": ["-c", "import jax, flax, optax"],
    "jaxops": ["-c", "import jaxops"],
    "jaxops_all_names": ["-c", "import jaxops; [getattr(jaxops, name) for name in jaxops.__all__]"],
    "help": ["-m", "jaxops", "--help"],
    "sweep_help": ["-m", "jaxops", "sweep", "--help"],
}


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Returns (wall, CPU) seconds of a Python process with these arguments."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for turn in range(args.turns + 1):
        for name in PROGRAMS if turn % 2 else reversed(PROGRAMS):
            found = seconds(PROGRAMS[name])
            if turn:  # the first writes bytecode and fills the cache of the disk
                times[name].append(found)
    wall, cpu = (
        {name: round(statistics.median(pair[which] for pair in pairs), 3) for name, pairs in times.items()}
        for which in (0, 1)
    )
    best = {name: round(min(pair[0] for pair in pairs), 3) for name, pairs in times.items()}
    print(
        json.dumps(
            {
                "name": "import_time",
                "ratio": round(cpu["jaxops"] / cpu["jax_flax_optax"], 3),
                "ratio_all_names": round(cpu["jaxops_all_names"] / cpu["jax_flax_optax"], 3),
                "aims": {"ratio": 1.3, "help_s": 0.5},
                "help_s": best["help"],
                "wall_s": wall,
                "least_wall_s": best,
                "cpu_s": cpu,
                "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "jaxops")},
            }
        )
    )


if __name__ == "__main__":
    main()
