"""A run of several processes: how they find each other, agree on decisions, and end.

Every process runs the same program on the same global batches; process 0 alone writes. Process 0 also makes the
decisions that must be made once, and sends them through jax's coordination service. No wait is unbounded: an error
names the processes that are missing, with the phase in which each was last seen. This is the only module that uses the
coordination service. Tested in tests/recovery/, which run and kill real processes.
"""

import contextlib
import glob
import importlib.util
import ipaddress
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, NoReturn

import jax

from jaxops.core.failures import EXIT_FAILED, EXIT_LOST, EXIT_USAGE, Lost, RunFailed, UserError
from jaxops.core.secret_text import without_secrets

VARIABLES = ("JAXOPS_COORDINATOR", "JAXOPS_NUM_PROCESSES", "JAXOPS_PROCESS_ID")
INITIALIZATION_SECONDS = 300
HEARTBEAT_SECONDS = 100
"""Seconds without a heartbeat after which a process counts as lost; jax then ends all the others."""
BARRIER_SECONDS = 600
"""Seconds for which the processes wait for each other outside of a step."""
SHUTDOWN_SECONDS = 15
_SLICE = 2.0
"""Seconds between two checks of a waiting process whether another process has failed."""
_FAILED, _GONE, _PHASE = "jaxops/failed", "jaxops/gone", "jaxops/phase"

_count: dict[str, int] = {}
"""The number of waits so far by name; all processes make the same calls, so their numbers agree."""


def initialize(environment: Mapping[str, str] | None = None) -> bool:
    """Joins the job that the environment describes, and returns whether there is one; call it before any computation.

    JAXOPS_COORDINATOR (host:port), JAXOPS_NUM_PROCESSES and JAXOPS_PROCESS_ID describe a job by hand; under Slurm, Open
    MPI and on TPU VMs jax finds the other processes itself. JAXOPS_INIT_SECONDS, JAXOPS_HEARTBEAT_SECONDS and
    JAXOPS_BARRIER_SECONDS bound the waiting. If the other processes do not come in time, this process prints a message
    and exits, since the wait inside jax cannot be interrupted.

    Raises:
      UserError: only some of the variables are set, or a value is not a number in range.
    """
    env = os.environ if environment is None else environment
    limit = seconds("JAXOPS_INIT_SECONDS", INITIALIZATION_SECONDS, env)
    options: dict[str, Any] = {
        "initialization_timeout": limit + 60,  # at its own timeout jax aborts without a reason, so ours comes first
        "heartbeat_timeout_seconds": seconds("JAXOPS_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS, env),
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    job = _by_hand(env)
    if job is None and not _found_by_jax(env):
        return False
    if job is not None:
        options |= {"coordinator_address": job[0], "num_processes": job[1], "process_id": job[2]}
        if _is_loopback(job[0]):  # jax would listen on every interface, and the service asks nobody who they are
            options["coordinator_bind_address"] = job[0]
    late = threading.Timer(limit, _nobody_came, [job, limit])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(**options)
    finally:
        late.cancel()
    sys.excepthook = _end_at_once
    announce_phase("start")
    return True


def _is_loopback(address: str) -> bool:
    """Returns true if `host:port` can be reached from this machine alone."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _nobody_came(job: tuple[str, int, int] | None, limit: int) -> None:
    where = (
        f"The {job[1]} processes of this job did not all meet at {job[0]}" if job else "The processes did not all meet"
    )
    print(
        f"jaxops: {where} within {limit} s (JAXOPS_INIT_SECONDS): is the command running on every host, and does each"
        " reach the first?",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_LOST)


def _by_hand(env: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Returns (coordinator, number of processes, this process) from the JAXOPS_... variables; None if none is set."""
    given = [name for name in VARIABLES if env.get(name)]
    if not given:
        return None
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        raise UserError(f"{', '.join(given)} set without {', '.join(missing)}: several processes need all three")
    address, count, number = (env[name] for name in VARIABLES)
    if not address.rpartition(":")[2].isdigit() or not address.rpartition(":")[0]:
        raise UserError(f"{VARIABLES[0]}={address}: expected host:port")
    if not (count.isdigit() and number.isdigit() and int(number) < int(count)):
        raise UserError(
            f"{VARIABLES[1]}={count}, {VARIABLES[2]}={number}: expected their number, and this one's from 0"
        )
    return address, int(count), int(number)


def is_one_of_several(env: Mapping[str, str] = os.environ) -> bool:
    """Returns whether the environment makes this process a part of a job: by hand, or as one of several tasks.

    Raises:
      UserError: the variables of a job by hand are wrong.
    """
    return _by_hand(env) is not None or _several_tasks(env)


def _several_tasks(env: Mapping[str, str]) -> bool:
    for size, also in (("SLURM_NTASKS", "SLURM_STEP_NODELIST"), ("OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri")):
        if env.get(size, "1").isdigit() and int(env.get(size, "1")) > 1 and also in env:
            return True
    return False


def _found_by_jax(env: Mapping[str, str]) -> bool:
    """Returns whether jax can find the other processes by itself: several Slurm or MPI tasks, or a TPU VM."""
    if _several_tasks(env):
        return True
    return importlib.util.find_spec("libtpu") is not None and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"))


def seconds(name: str, default: int, env: Mapping[str, str] = os.environ) -> int:
    """Reads a number of seconds from the environment.

    Raises:
      UserError: the value is not a positive whole number.
    """
    text = env.get(name, str(default))
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{name}={text}: expected a whole number of seconds")
    return int(text)


def is_distributed() -> bool:
    """Returns whether this run has several processes."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Returns whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def _client() -> Any:
    from jax._src import distributed  # jax has no public access to the coordination service

    return distributed.global_state.client


def run_on_primary(what: str, fn: Callable[[], Any]) -> Any:
    """Runs `fn` on process 0 and returns its result (JSON) on all processes.

    A UserError or RunFailed of `fn` is raised on all processes.

    Raises:
      Lost: process 0 has not answered within JAXOPS_BARRIER_SECONDS.
      RunFailed: another process failed meanwhile.
    """
    if not is_distributed():
        return fn()
    key = _next(f"jaxops/on_first/{what}")
    if is_primary():
        try:
            word = {"value": fn()}
        except (UserError, RunFailed) as error:
            error.shared = True
            status = getattr(error, "status", EXIT_FAILED)
            _client().key_value_set(
                key, json.dumps({"error": type(error).__name__, "text": str(error), "status": status})
            )
            raise
        _client().key_value_set(key, json.dumps(word))
        return word["value"]
    text, limit = _wait(key)
    if text is None:
        raise Lost(f"{what}: no answer from process 0 in {limit} s; it {_doing(0)}{_LONGER}")
    word = json.loads(text)
    if "error" in word:
        if word["error"] == "UserError":
            raise UserError(word["text"], shared=True)
        raise RunFailed(word["text"], shared=True, status=word["status"])
    return word["value"]


def gather(what: str, value: Any) -> list[Any]:
    """Returns the `value` (JSON) of every process, ordered by process; raises as `barrier` does."""
    if not is_distributed():
        return [value]
    key = _next(f"jaxops/gather/{what}")
    _client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    barrier(what)
    found = {int(name.rpartition("/")[2]): json.loads(text) for name, text in _client().key_value_dir_get(key)}
    return [found[rank] for rank in sorted(found)]


def barrier(what: str) -> None:
    """Returns when all processes have called it with the same `what`.

    Raises:
      Lost: some did not come within JAXOPS_BARRIER_SECONDS; it names them and what they did last.
    """
    if not is_distributed():
        return
    missing, limit = _absent(_next(f"jaxops/meet/{what}"))
    if missing:
        said = "; ".join(f"process {rank} {_doing(rank)}" for rank in missing)
        raise Lost(f"waited {limit} s at '{what}' for {named(missing)}: {said}{_LONGER}")


_LONGER = " (JAXOPS_BARRIER_SECONDS allows for more)"


def _absent(key: str, limit: int | None = None) -> tuple[list[int], int]:
    """Waits at `key`, and returns the processes that did not come in time, with the time limit in seconds."""
    client = _client()
    client.key_value_set(f"{key}/here/{jax.process_index()}", "")
    if client.key_value_increment(f"{key}/count", 1) == jax.process_count():
        client.key_value_set(f"{key}/open", "")
    found, limit = _wait(f"{key}/open", limit)
    if found is not None:
        return [], limit
    there = {int(name.rpartition("/")[2]) for name, _ in client.key_value_dir_get(f"{key}/here")}
    return sorted(set(range(jax.process_count())) - there), limit


def _wait(key: str, limit: int | None = None) -> tuple[str | None, int]:
    """Returns the value of a key once it is set, or None at the time limit, with the limit in seconds.

    Raises:
      RunFailed: another process failed meanwhile.
    """
    limit = limit or seconds("JAXOPS_BARRIER_SECONDS", BARRIER_SECONDS)
    until = time.monotonic() + limit
    while (left := until - time.monotonic()) > 0:
        try:
            return _client().blocking_key_value_get(key, int(1000 * min(left, _SLICE)) + 1), limit
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        for rank, word in others_failed().items():
            raise _failed_there(rank, word)
    return None, limit


def _failed_there(rank: int, word: Mapping[str, Any]) -> RunFailed:
    return RunFailed(f"process {rank} failed ({word['where']}): {word['text']}", status=int(word["status"]))


def announce_phase(phase: str) -> None:
    """Announces the phase of this process (loading, training, ...), which others name in their error messages."""
    if is_distributed():
        _client().key_value_set(f"{_PHASE}/{jax.process_index()}", phase, allow_overwrite=True)


def _doing(rank: int) -> str:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return f"was last seen at '{_client().key_value_try_get(f'{_PHASE}/{rank}')}'"
    return "said nothing of itself"


def named(ranks: Iterable[int]) -> str:
    """Returns process numbers as text, such as `processes 1, 2 of 4`."""
    found = [str(rank) for rank in ranks]
    return f"process{'es' if len(found) > 1 else ''} {', '.join(found)} of {jax.process_count()}"


def _next(name: str) -> str:
    _count[name] = _count.get(name, 0) + 1
    return f"{name}/{_count[name]}"


def announce_failure(error: BaseException, where: str) -> None:
    """Announces that this process fails and why, so that the other processes end too (`others_failed`)."""
    if not is_distributed() or getattr(error, "shared", False):
        return
    text = without_secrets(f"{type(error).__name__}: {error}".split("\n")[0])[:500]
    status = EXIT_USAGE if isinstance(error, UserError) else getattr(error, "status", EXIT_FAILED)
    word = {"text": text, "where": where, "status": status}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # said already, or the coordinator is what was lost
        _client().key_value_set(f"{_FAILED}/{jax.process_index()}", json.dumps(word))


def others_failed() -> dict[int, dict[str, Any]]:
    """Returns the failures that other processes have announced: process -> {text, where, status}."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        found = _client().key_value_dir_get(_FAILED)
        words = {int(name.rpartition("/")[2]): json.loads(text) for name, text in found}
        return {rank: word for rank, word in words.items() if rank != jax.process_index()}
    return {}


def explain_lost(error: jax.errors.JaxRuntimeError, where: str) -> BaseException:
    """Explains a failed computation: by the message of another process that failed, or by which one is gone.

    Returns the error itself where nothing is lost.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text:
        return error
    if not is_distributed():
        return _backend_lost(text, where) or error
    for _ in range(10):
        if failed := others_failed():
            return _failed_there(*next(iter(failed.items())))
        time.sleep(0.2)
    try:
        missing, _ = _absent("jaxops/lost", 5)
    except jax.errors.JaxRuntimeError:  # the service does not answer, so process 0, which runs it, is lost
        missing = [0]
    if not missing:
        return _backend_lost(text, where) or error
    return Lost(
        f"lost {named(missing)} ({where}): killed, or its machine is gone; the same command resumes from the last"
        f" checkpoint. jax says: {' '.join(text.split())[:200]}"
    )


_BACKEND = re.compile(
    r"^(UNAVAILABLE|ABORTED|DATA_LOSS)\b|CUDA_ERROR_(ECC|DEVICE_UNAVAILABLE|SYSTEM_NOT_READY)"
    r"|uncorrectable|device (is )?(lost|halted)|[Ss]ocket closed|[Cc]onnection (reset|refused)|TPU.*(unhealthy|preempt)"
)
"""What runtimes say of devices that are gone, or of the way to them."""


def _backend_lost(text: str, where: str) -> Lost | None:
    """The error of a device that is gone, in words; None where the program may be what is wrong."""
    if _BACKEND.search(text) is None:
        return None
    return Lost(
        f"lost the devices, or the way to them ({where}); the same command resumes from the last checkpoint. jax says:"
        f" {' '.join(text.split())[:300]}"
    )


def leave(status: int) -> NoReturn:
    """Ends this process at once: the ordinary exit would wait for the others at a barrier that they never reach.

    Process 0 runs the coordination service, without which jax aborts the others before they can report their error. So
    process 0 stays until they are gone, two seconds at most.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_GONE}/{jax.process_index()}", "", allow_overwrite=True)
        until = time.monotonic() + 2
        while is_primary() and time.monotonic() < until:
            if len(_client().key_value_dir_get(_GONE)) == jax.process_count():
                break
            time.sleep(0.05)
    os._exit(status)


def _end_at_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints the traceback, announces the failure and exits; the `sys.excepthook` of a run of several processes.

    It acts on the main thread only, since C++ threads also report errors here that concern no run.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
    announce_failure(error, "outside of the run")
    leave(EXIT_FAILED)


def shut_down() -> None:
    """Leaves the job in order, once all processes have called it."""
    if is_distributed():
        barrier("exit")
        jax.distributed.shutdown()
