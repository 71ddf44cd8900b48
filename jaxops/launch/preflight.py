"""What a host looks at before it trains: `python -m jaxops.launch.preflight VERB`, with a question on stdin.

`hosts` is about one host, `devices` is a job of all workers; `together` is both, for workers that nobody drives: they
compare what they found among themselves. Each check has a time-out, and the answer is one line of JSON: {"problems":
[sentence], "facts": {name: value that all hosts must share}, "clock", "asked"}.
"""

import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.launch.save_speed import check_save, state_share

CLOCK = time.time()
LEAST_DISK, LEAST_MEMORY = 2 << 30, 1 << 30
"""Bytes that must be free for a worker."""
LEAST_SHM = 512 << 20
CHECK_SECONDS = 60.0
CLOCK_SECONDS = 60.0
"""How far the clocks of two hosts may be apart."""


def examine_host(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the checks of one host."""
    facts: dict[str, str] = {}
    checks: dict[str, Callable[[], None]] = {
        "versions": lambda: facts.update(_versions()),
        "code": lambda: facts.update(_digests(asked)),
        "run.dir": lambda: _use_folder(asked["run_dir"]),
        "config and data": lambda: _read_data(asked),
        "disk": _look_at_disk,
        "memory": _look_at_memory,
    }
    if asked.get("chips"):
        checks["shared memory"] = _look_at_shm
    problems = [told for name, check in checks.items() if (told := _problem(name, check))]
    return {"problems": problems, "facts": facts, "clock": CLOCK, "asked": asked["asked"]}


def _problem(name: str, check: Callable[[], None], limit: float = CHECK_SECONDS) -> str | None:
    """Returns what is wrong, in words; a check that does not end within its time is wrong too."""
    told: list[str | None] = []

    def run() -> None:
        try:
            check()
            told.append(None)
        except Exception as error:
            words = str(error) if str(error) else traceback.format_exc().strip().splitlines()[-1]
            told.append(f"{name}: {words}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    return told[0] if told else f"{name}: no answer within {limit:.0f} s"


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy")
    return {"Python": ".".join(platform.python_version_tuple()[:2])} | {
        name: importlib.metadata.version(name) for name in names
    }


def _digests(asked: Mapping[str, Any]) -> dict[str, str]:
    """Returns digests of the code as it lies here, of the jaxops that is imported, and of the lock file.

    Of the code the files that were brought: an earlier attempt may have left others beside them.
    """
    code, package = Path(asked["code"]), Path(__file__).parents[1]
    own = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    found = {"the code": _digest(code, asked["files"]), "jaxops": _digest(package, own)}
    return found | ({"the lock file": _digest(code, [asked["lock"]])} if (code / asked["lock"]).is_file() else {})


def _digest(folder: Path, names: Sequence[str]) -> str:
    total = hashlib.sha256()
    for name in names:
        content = (folder / name).read_bytes() if (folder / name).is_file() else b"-"
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]


def _use_folder(place: str) -> None:
    """Creates, reads and deletes a file in the folder of runs."""
    from jaxops.core import store_probe, stores

    if stores.is_url(place):
        store_probe.check_access(place)
        return
    os.makedirs(place, exist_ok=True)
    probe = os.path.join(place, f".launch-{uuid.uuid4().hex}")
    try:
        Path(probe).write_bytes(b"jaxops")
        if Path(probe).read_bytes() != b"jaxops":
            raise RuntimeError(f"{place}: what was written there cannot be read again")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(probe)


def _read_data(asked: Mapping[str, Any]) -> None:
    """Reads the config as the worker will, and the first byte of each file that its data name."""
    from jaxops.core import store_probe, stores
    from jaxops.run.build import load_config

    loaded = load_config(asked["config"], asked["overrides"])
    for place in _paths(loaded.resolved.get("data")):
        if stores.is_url(place):
            if place.startswith(tuple(f"{scheme}://" for scheme in stores.EXTRAS)):
                store_probe.check_access(place.partition("*")[0].rpartition("/")[0], write=False)
            continue
        found = [path for path in glob.glob(os.path.expanduser(place), recursive=True) if os.path.isfile(path)]
        if not found and not os.path.isdir(os.path.expanduser(place)):
            raise RuntimeError(f"data: {place} is not here (looked for from {os.getcwd()})")
        for path in found[:3]:
            with open(path, "rb") as file:
                file.read(1)


def _paths(section: Any) -> list[str]:
    """Returns the values named `path` of a section, at any depth."""
    if isinstance(section, list | tuple):
        return [path for one in section for path in _paths(one)]
    if not isinstance(section, Mapping):
        return []
    own = section.get("path")
    given = own if isinstance(own, list | tuple) else [own]
    mine = [path for path in given if isinstance(path, str)]
    return mine + [path for name, value in section.items() if name != "path" for path in _paths(value)]


def _look_at_disk() -> None:
    free = shutil.disk_usage(".").free
    if free < LEAST_DISK:
        raise RuntimeError(f"{free / 2**30:.1f} GiB are free where the code lies; make room for {LEAST_DISK >> 30} GiB")


def _look_at_shm() -> None:
    """Containers have 64 MiB of shared memory by default, which input workers and libtpu fill at once."""
    with contextlib.suppress(OSError):
        total = shutil.disk_usage("/dev/shm").total
        if total < LEAST_SHM:
            raise RuntimeError(
                f"/dev/shm has {total >> 20} MiB, as a container has by default; give it {LEAST_SHM >> 20} or more:"
                " docker run --shm-size=8g, or an emptyDir of medium Memory at /dev/shm"
            )


def _look_at_memory() -> None:
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), LEAST_MEMORY)
        if free < LEAST_MEMORY:
            raise RuntimeError(f"{free >> 20} MiB are free; another program holds the rest")


def examine_devices(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the job, counts its devices, sums over each axis of the mesh, and times a save against the grace period."""
    shares: list[int] = []
    told = _problem("devices", lambda: shares.append(_meet(asked)), asked["limit"])
    if not told and "grace" in asked:
        told = _problem("a save", lambda: check_save(asked["run_dir"], shares[0], asked["grace"]), asked["limit"])
    return {"problems": [told] if told else []}


def examine_together(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the checks of one host; if they pass, joins the job, and compares with the other workers as well."""
    found = examine_host(asked)
    if not found["problems"]:
        found["problems"] = examine_devices({**asked, "facts": found["facts"]})["problems"]
    return found


def _meet(asked: Mapping[str, Any]) -> int:
    """Returns the bytes that each worker will save, where the question names a config."""
    os.environ.update(asked["env"])
    os.environ.setdefault("JAXOPS_INIT_SECONDS", str(int(asked["limit"] // 2)))
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxops.core import distributed
    from jaxops.core.mesh import make_mesh, use_cpu_devices

    if asked["cpu_devices"]:
        use_cpu_devices(asked["cpu_devices"])
    distributed.initialize()
    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    if kinds != [asked["kind"]] or len(devices) != asked["devices"]:
        raise RuntimeError(
            f"jax sees {len(devices)} x {', '.join(kinds)}, and --on asks for {asked['devices']} x {asked['kind']}"
        )
    mesh = make_mesh(**asked["mesh"])
    for axis, size in mesh.shape.items():
        if size == 1:
            continue
        one_each, numbers = PartitionSpec(axis), np.arange(size, dtype=np.int32)
        rows = jax.make_array_from_callback((size,), NamedSharding(mesh, one_each), numbers.__getitem__)
        add = functools.partial(jax.lax.psum, axis_name=axis)
        total = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=one_each, out_specs=PartitionSpec()))(rows)
        if int(np.asarray(total.addressable_data(0))[0]) != size * (size - 1) // 2:
            raise RuntimeError(f"a sum over the {size} devices of mesh axis {axis} is wrong")
    if "facts" in asked and jax.process_count() > 1:
        _compare(asked["facts"])
    share = state_share(asked["config"], asked["overrides"], mesh) if "config" in asked else 0
    distributed.shut_down()
    return share


def _compare(facts: Mapping[str, str]) -> None:
    """Compares what all workers found, and their clocks; each worker raises the same error."""
    import numpy as np
    from jax.experimental import multihost_utils

    digests = [hashlib.sha256(f"{name}={facts[name]}".encode()).digest()[:4] for name in sorted(facts)]
    mine = np.array([int.from_bytes(one, "little") for one in digests] + [int(time.time())], np.uint32)
    rows = np.asarray(multihost_utils.process_allgather(mine))
    for column, name in enumerate(sorted(facts)):
        others = [worker for worker, row in enumerate(rows) if row[column] != rows[0][column]]
        if others:
            raise RuntimeError(
                f"hosts disagree on {name}: workers {', '.join(map(str, others))} have another than worker 0; here it"
                f" is {facts[name][:40]}; all workers must run the same"
            )
    clocks = rows[:, -1].astype(np.int64)
    if int(clocks.max() - clocks.min()) > CLOCK_SECONDS:
        raise RuntimeError(
            f"the clocks of workers {clocks.argmin()} and {clocks.argmax()} are {clocks.max() - clocks.min()} s apart:"
            " set them (chrony, ntp)"
        )


def main() -> None:
    """Answers the question on stdin and ends, however many threads still hang."""
    asked = json.load(sys.stdin)
    os.environ.update(asked["secrets"])  # what the config may name
    if hasattr(signal, "alarm"):  # the launcher may be gone
        signal.alarm(int(asked["limit"]) + 30)
    verbs = {"hosts": examine_host, "devices": examine_devices, "together": examine_together}
    answer = verbs[sys.argv[1]](asked)
    print(f"\n{json.dumps(answer)}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
