"""What a scheduler's workers find in the folder of runs, and what they leave there.

The layout is described in jaxops/launch/backends/__init__.py. Tested in tests/launch/, with each cluster.
"""

import io
import json
import tarfile
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxops.core import stores
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.store_paths import path as store_path
from jaxops.launch.accelerators import find_accelerator
from jaxops.launch.backends.protocol import Job, Scheduler
from jaxops.launch.code import Code
from jaxops.launch.facts import launch_facts
from jaxops.launch.record import LaunchRecord
from jaxops.launch.scripts import script
from jaxops.launch.stages import CHECK_SECONDS, device_question, host_question

HOST_SCRIPTS = ("start_worker.sh", "attend_worker.py", "setup_host.sh")
SILENT_SECONDS = 180.0
"""The age of a heartbeat from which its worker counts as lost."""


def worker_json(record: LaunchRecord, code: Code, backend: Scheduler) -> dict[str, Any]:
    """Returns what a worker runs, under which rules; it holds no secret."""
    spec, accelerator = record.spec, find_accelerator(record.spec.type)
    asked = {**host_question(record, code), **device_question(record), "limit": CHECK_SECONDS}
    return {
        "argv": spec.argv,
        "facts": launch_facts(record),
        "inside": code.inside,
        "python": spec.python,
        "lock": spec.lock,
        "wheelhouse": spec.wheelhouse,
        "accel": "cpu" if accelerator.chip is None else "tpu",
        "devices": spec.devices,
        "coordinator": spec.coordinator,
        "meet": backend.meet,
        "secrets": dict(map(_where, spec.secrets)),
        "hours": record.hours,
        "grace": record.grace,
        # The cluster takes the hosts away when the hours are used up, so the save comes before.
        "early": min(record.grace, record.hours * 1800),
        "asked": asked,
    }


def _where(secret: str) -> tuple[str, str]:
    """Returns a secret's name, and where the worker looks: Kubernetes has put its own into the environment."""
    name, _, source = secret.partition("=")
    return name, "env" if source.startswith("k8s:") else source or "env"


def host_tar(record: LaunchRecord, code: Code, backend: Scheduler) -> bytes:
    """Returns the tar of the host scripts and worker.json; the same bytes for the same launch."""
    files = {name: script(name).read_bytes() for name in HOST_SCRIPTS}
    files["worker.json"] = json.dumps(worker_json(record, code, backend), indent=1, sort_keys=True).encode()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def write_files(job: Job, tar: bytes, code: Code, files: Mapping[str, str]) -> None:
    """Writes all that the workers need into the folder of runs; what is there already is left alone.

    Raises:
      UserError: the folder cannot be written to.
    """
    root = store_path(job.spec.run_dir)
    wanted = {f"code/{code.sha256}.tar": code.tar, f".launch/{job.id}/host-{job.record.host}.tar": tar}
    try:
        for name, data in wanted.items():
            if not (root / name).exists():
                _write(root / name, data)
        for name, text in files.items():
            _write(store_path(job.folder) / name, text.encode())
    except OSError as error:
        raise UserError(f"run.dir={job.spec.run_dir} cannot be written to: {error}") from None


def _write(place: epath.Path, data: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if stores.is_url(place):
        place.write_bytes(data)
        return
    scratch = place.parent / f".{place.name}.{time.time_ns()}"
    scratch.write_bytes(data)
    scratch.replace(place)


def attempts(job: Job) -> list[int]:
    """Returns the numbers of the attempts that have begun, in their order."""
    root = store_path(job.folder)
    try:
        names = [place.name for place in root.iterdir()] if root.exists() else []
    except OSError as error:
        raise UserError(f"run.dir={job.spec.run_dir} cannot be read: {error}") from None
    numbers = [name[len("attempt-") :] for name in names if name.startswith("attempt-")]
    return sorted(int(number) for number in numbers if number.isdigit())


def next_attempt(job: Job) -> int:
    """Returns the number of the next attempt: no folder of an earlier one has it."""
    return max(attempts(job), default=0) + 1


def current_attempt(job: Job) -> int:
    """Returns the number of the attempt that the cluster has begun last, where it counts by itself."""
    try:
        number = int((store_path(job.folder) / "attempt").read_text())
    except (OSError, ValueError):
        return job.record.attempt
    return max(number, job.record.attempt)


def deadline(job: Job) -> float | None:
    """Returns the Unix time at which the hours are used up; None where no attempt has begun."""
    try:
        return float((store_path(job.folder) / "started").read_text()) + job.record.hours * 3600
    except (OSError, ValueError):
        return None


def ask_to_stop(job: Job) -> None:
    """Notes in the launch's folder that nobody tries again.

    Raises:
      RunFailed: the folder cannot be written to.
    """
    try:
        _write(store_path(job.folder) / "stop", b"stop\n")
    except OSError as error:
        raise RunFailed(f"run.dir={job.spec.run_dir} cannot be written to: {error}") from None


def stop_wanted(job: Job) -> bool:
    """Returns whether the launch's folder says that nobody tries again."""
    return bool((store_path(job.folder) / "stop").exists())


def begin_anew(job: Job) -> None:
    """Takes back the wish to stop, and the beginning of the hours, as a new launch does."""
    for name in ("stop", "started"):
        place = store_path(job.folder) / name
        if place.exists():
            place.unlink()


def remove_files(job: Job) -> None:
    """Removes the launch's folder with its logs; the run and its code stay.

    Raises:
      RunFailed: it cannot be removed.
    """
    place = store_path(job.folder)
    try:
        if place.exists():
            place.rmtree()
    except OSError as error:
        raise RunFailed(f"{job.folder} cannot be removed: {error}") from None


def read_end(job: Job, attempt: int, worker: int) -> Mapping[str, Any] | None:
    """Returns how a worker ended: {"code", "why", "host"}; None where it has not."""
    return _json(job, attempt, worker, "json")


def read_beat(job: Job, attempt: int, worker: int) -> Mapping[str, Any] | None:
    """Returns a worker's last heartbeat: {"time", "phase", "host", "pid"}; None where there is none yet."""
    return _json(job, attempt, worker, "beat")


def _json(job: Job, attempt: int, worker: int, kind: str) -> Mapping[str, Any] | None:
    try:
        found = json.loads((store_path(job.folder) / f"attempt-{attempt}/worker-{worker}.{kind}").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise RunFailed(f"{job.folder} cannot be read: {error}") from None
    return found if isinstance(found, Mapping) else None


def read_log(job: Job, attempt: int, worker: int, offset: int) -> tuple[str, int]:
    """Returns what a worker has said from a byte on, and the byte after it."""
    place = store_path(job.folder) / f"attempt-{attempt}/worker-{worker}.log"
    try:
        if stores.is_url(job.folder):
            data = place.read_bytes()[max(offset, 0) :]
        else:
            with open(str(place), "rb") as file:
                file.seek(offset)
                data = file.read(1 << 20)
    except OSError:
        return "", offset
    return data.decode("utf-8", "replace"), offset + len(data)
