"""How long a save takes in the folder of runs, before a run begins: a preemption leaves the grace period and no more.

As much as a worker would save is written and read again, up to a bound, and the rest is reckoned from the speed.
Tested in tests/launch/test_save_speed.py.
"""

import dataclasses
import math
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxops.core import stores

MOST_BYTES, MOST_SECONDS = 1 << 30, 10.0
"""What is written at most, and for how long."""
BLOCK = 16 << 20
LEAST_BYTES = 64 << 20
"""A smaller state is saved within any grace period, and too small to measure a speed."""


@dataclasses.dataclass(frozen=True)
class SaveSpeed:
    """A measured save: bytes written, and seconds until they were durable and read again."""

    written: int
    seconds: float

    def reckon(self, share: int) -> float:
        """Returns the seconds that `share` bytes take."""
        return share / self.written * self.seconds


def state_share(config: str, overrides: Sequence[str], mesh: Any) -> int:
    """Returns the bytes that each process saves: the state of a run, shared out evenly. No array is made.

    It is 0 where that cannot be told without reading the data.

    Raises:
      UserError: the config cannot be read, or does not go with the mesh.
    """
    import jax

    from jaxops.run.build import load_config
    from jaxops.run.family import Given, family_of
    from jaxops.run.training import abstract, build_training

    loaded = load_config(config, overrides)
    outline = family_of(loaded.config.task).outline
    if outline is None:
        return 0
    with tempfile.TemporaryDirectory(prefix="jaxops-save-") as folder, jax.set_mesh(mesh):
        task = outline(loaded, Given(), Path(folder))
        state = abstract(build_training(task, mesh, 1).fresh, mesh)
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if hasattr(leaf, "dtype")]
    return sum(sizes) // jax.process_count()


def measure(place: str, share: int, now: Callable[[], float] = time.monotonic) -> SaveSpeed:
    """Writes up to `share` bytes below a folder or URL, reads them again and removes them.

    Raises:
      OSError: it cannot be written to.
      RuntimeError: what is read is not what was written.
    """
    most = min(share, MOST_BYTES)
    block = os.urandom(1 << 20) * (min(most, BLOCK) // (1 << 20) or 1)
    probe = f"{place.rstrip('/')}/.launch-save-{uuid.uuid4().hex}"
    written, parts, begun = 0, 0, now()
    put, get, drop = _ways(probe)
    try:
        while written < most and (not parts or now() - begun < MOST_SECONDS):
            put(parts, block)
            parts += 1
            written += len(block)
        if get(parts - 1) != block:
            raise RuntimeError(f"{place}: what was written there cannot be read again")
        return SaveSpeed(written, max(now() - begun, 1e-6))
    finally:
        for part in range(parts):
            drop(part)


def _ways(probe: str) -> tuple[Callable[[int, bytes], Any], Callable[[int], bytes], Callable[[int], Any]]:
    if stores.is_url(probe):
        from jaxops.core.store_paths import path

        return (
            lambda part, data: path(f"{probe}-{part}").write_bytes(data),
            lambda part: path(f"{probe}-{part}").read_bytes(),
            lambda part: path(f"{probe}-{part}").unlink(),
        )

    def put(part: int, data: bytes) -> None:
        with open(f"{probe}-{part}", "wb") as file:
            file.write(data)
            os.fsync(file.fileno())

    return put, lambda part: Path(f"{probe}-{part}").read_bytes(), lambda part: os.unlink(f"{probe}-{part}")


def check_save(place: str, share: int, grace: float) -> None:
    """Sees whether a worker can save within the grace period.

    Raises:
      RuntimeError: it takes longer; the message says what helps.
    """
    if share < LEAST_BYTES:
        return
    speed = measure(place, share)
    seconds = speed.reckon(share)
    if seconds > grace:
        raise RuntimeError(
            f"a save of {share / 2**30:.1f} GiB by each worker takes about {seconds:.0f} s in {place}"
            f" ({speed.written / speed.seconds / 2**20:.0f} MiB/s measured), and --grace is {grace:g} s: after a"
            f" preemption only the checkpoint before it would be left. Use --grace {math.ceil(seconds * 1.5)} where the"
            " machines allow it, more hosts, or a faster folder"
        )
