"""The stages of a launch before its workers train, the same for every backend, each safe to repeat.

Reach the hosts, see that the run's folder is shared, bring the code, make the environment, look at everything, start.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

from jaxops.core import stores
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.store_paths import path as store_path
from jaxops.launch.accelerators import find_accelerator
from jaxops.launch.code import Code
from jaxops.launch.facts import VARIABLE, launch_facts
from jaxops.launch.hosts import Host, Unreachable, at_port, each
from jaxops.launch.preflight import CLOCK_SECONDS
from jaxops.launch.record import LaunchRecord, Spec
from jaxops.launch.session import Session

SETUP_SECONDS = 3600.0
CHECK_SECONDS = 300.0


def prepare(session: Session, code: Code) -> None:
    """Makes everything ready for the workers.

    Raises:
      UserError, RunFailed: something is not as it must be; the message names the host.
    """
    session.note(state="preparing", code=code.sha256, inside=code.inside, status=None, why="")
    several = f"{len(session.hosts)} workers on {', '.join(host.name for host in session.hosts)}"
    session.say(f"reaching {several}")
    try:
        session.note(roots=tuple(each(lambda _, host: session.put(host, "worker.py"), session.hosts)))
    except Unreachable as error:  # not while it runs: the name, or the way there, is wrong
        raise UserError(str(error)) from None
    see_shared_folder(session)
    session.say(f"code: {len(code.files)} files, {len(code.tar) / 2**20:.1f} MiB, SHA-256 {code.sha256[:16]}")
    bring_code(session, code)
    session.note(python=make_environment(session, code))
    session.say("preflight: versions, code, run.dir, data, disk, memory, clock")
    check_hosts(session, code)
    session.say("preflight: devices, and a collective on each mesh axis")
    check_devices(session)


def see_shared_folder(session: Session) -> None:
    """Writes a file into run.dir from the first host, and sees it from the others.

    Raises:
      UserError: a host does not see what another one wrote, or the folder cannot be written to.
    """
    folder, token = session.record.spec.run_dir, uuid.uuid4().hex
    if stores.is_url(folder):
        return
    try:
        session.ask(0, "shared", folder, "write", token)
    except RunFailed as error:
        raise UserError(f"run.dir={folder} cannot be written to: {error}") from None
    try:
        seen = each(lambda worker, _: session.ask(worker, "shared", folder, "read", token, seen=True), session.hosts)
    finally:
        session.ask(0, "shared", folder, "delete", token)
    blind = [host.name for host, answer in zip(session.hosts, seen, strict=True) if not answer["seen"]]
    if blind:
        raise UserError(
            f"run.dir={folder} is not shared: {', '.join(blind)} cannot read what {session.hosts[0].name} wrote there;"
            " name a folder on a file system that all hosts have, or an object store (gs://, s3://)"
        )


def bring_code(session: Session, code: Code) -> None:
    """Stores the tar at run.dir/code/SHA256.tar, and has every worker verify and unpack it.

    Raises:
      RunFailed: a host lacks the code of this launch, which has changed here since.
    """
    spec, digest = session.record.spec, session.record.code
    name = f"code/{digest}.tar"
    if stores.is_url(spec.run_dir):
        keepers, places = len(session.hosts), [f"{root}/{name}" for root in session.record.roots]
        if session.dry:
            print(f"write {spec.run_dir}/{name}")
        elif code.sha256 == digest:
            store_path(f"{spec.run_dir}/{name}").write_bytes(code.tar)
    else:
        keepers, places = 1, [f"{spec.run_dir}/{name}"] * len(session.hosts)

    def bring(worker: int, host: Host) -> None:
        if session.ask(worker, "keep", places[worker], digest, kept=False)["kept"]:
            return
        if code.sha256 != digest:
            raise RunFailed(f"{host.name}: the code of this launch is gone there, and has changed here: launch again")
        source, limit = f"{len(code.files)} files of {code.folder}, as a tar", 60 + len(code.tar) / 2**17
        session.ask(worker, "keep", places[worker], digest, stdin=code.tar, source=source, timeout=limit, kept=True)

    each(bring, session.hosts[:keepers])
    unpack = lambda worker, _: session.ask(
        worker, "unpack", places[worker], digest, code_folder(session, worker), timeout=600
    )
    each(unpack, session.hosts)


def code_folder(session: Session, worker: int) -> str:
    """Returns the folder in which a host has the code of the launch."""
    return f"{session.record.roots[worker]}/code/{session.record.code}"


def make_environment(session: Session, code: Code) -> tuple[str, ...]:
    """Makes the environment of each host from the lock file, unless a Python is named; returns the interpreters.

    Raises:
      RunFailed: it cannot be made; the message has the last words of `setup_host.sh`.
    """
    spec = session.record.spec
    if spec.python:
        return (spec.python,) * len(session.hosts)
    lock = (code.folder / spec.lock).read_bytes()
    digest = hashlib.sha256(b"\0".join([lock, _packages(spec).encode(), spec.wheelhouse.encode()])).hexdigest()[:16]
    session.say(f"environment: from {spec.lock}; the first time takes minutes")

    make = lambda worker, host: _set_up(session, worker, host, lambda root: f"{os.path.dirname(root)}/env/{digest}")
    return tuple(each(make, session.hosts))


def _packages(spec: Spec) -> str:
    """Returns which of jax's packages the hosts need: `tpu` or `cpu`."""
    return "cpu" if find_accelerator(spec.type).chip is None else "tpu"


def _set_up(session: Session, worker: int, host: Host, folder_of: Callable[[str], str]) -> str:
    """Runs `setup_host.sh` on a host, and returns the interpreter of the environment."""
    spec, root = session.record.spec, session.put(host, "setup_host.sh")
    folder = folder_of(root)
    argv = [
        "env",
        f"ACCEL={_packages(spec)}",
        "sh",
        f"{root}/setup_host.sh",
        f"{code_folder(session, worker)}/{spec.lock}",
    ]
    done = session.run(host, [*argv, folder, *filter(None, [spec.wheelhouse])], timeout=SETUP_SECONDS)
    if done.code:
        raise RunFailed(f"{host.name}: setup_host.sh ended with {done.code}: {done.last_words}")
    return f"{folder}/bin/python"


def restore_hosts(session: Session, code: Code) -> None:
    """Brings again what a host may have lost with its disk: its script, the code, the environment.

    Raises:
      RunFailed: it cannot be brought; the message names the host.
    """
    each(lambda _, host: session.put(host, "worker.py"), session.hosts)
    bring_code(session, code)
    if not session.record.spec.python:
        pythons = session.record.python
        folder = lambda worker: os.path.dirname(os.path.dirname(pythons[worker]))
        each(lambda worker, host: _set_up(session, worker, host, lambda _: folder(worker)), session.hosts)


def check_hosts(session: Session, code: Code) -> None:
    """Runs the checks of jaxops/launch/preflight.py on each host, and compares what they found.

    Raises:
      UserError: a check fails, or two hosts disagree.
    """
    asked = host_question(session.record, code)
    found = _checked(session, ["hosts"], lambda worker: asked, CHECK_SECONDS)
    if session.dry:
        return
    for name in found[0]["facts"]:
        values = [str(answer["facts"][name]) for answer in found]
        if len(set(values)) > 1:
            each_says = ", ".join(f"{host.name} has {v[:40]}" for host, v in zip(session.hosts, values, strict=True))
            raise UserError(f"hosts disagree on {name}: {each_says}; all workers must run the same")
    late = [answer["clock"] - answer["asked"] for answer in found]
    if max(late) - min(late) > CLOCK_SECONDS:
        slow, fast = session.hosts[late.index(min(late))].name, session.hosts[late.index(max(late))].name
        raise UserError(
            f"the clocks of {slow} and {fast} are {max(late) - min(late):.0f} s apart: set them (chrony, ntp)"
        )


def host_question(record: LaunchRecord, code: Code) -> dict[str, Any]:
    """Returns what the preflight is asked about one host."""
    spec = record.spec
    chips = find_accelerator(spec.type).chip is not None
    return {**_config(spec), "run_dir": spec.run_dir, "lock": spec.lock, "files": code.files, "chips": chips}


def device_question(record: LaunchRecord) -> dict[str, Any]:
    """Returns what the preflight is asked about the devices of all hosts together."""
    spec, accelerator = record.spec, find_accelerator(record.spec.type)
    asked: dict[str, Any] = {"mesh": spec.mesh, "devices": accelerator.devices, "cpu_devices": spec.devices}
    asked["kind"] = accelerator.chip.kind if accelerator.chip else "cpu"
    return {**asked, **_config(spec), "run_dir": spec.run_dir, "grace": record.grace}


def _config(spec: Spec) -> dict[str, Any]:
    """Returns the config of a launch and its overrides, as the preflight reads them."""
    words = [word for word in spec.argv[1:] if not word.startswith("--")]
    return {"config": words[0], "overrides": [word for word in words[1:] if "=" in word]}


def check_devices(session: Session) -> None:
    """Has all workers meet, count their devices and sum over each mesh axis.

    Raises:
      UserError: a device is missing or of another kind, or the workers do not reach each other.
    """
    asked = device_question(session.record)
    session.note(coordinator=_meeting_point(session))
    _checked(session, ["devices"], lambda worker: {**asked, "env": environment(session, worker)}, CHECK_SECONDS)


def _checked(session: Session, argv: list[str], asked: Any, limit: float) -> list[dict[str, Any]]:
    """Runs jaxops/launch/preflight.py on all hosts at once and returns what each found."""

    def check(worker: int, host: Host) -> dict[str, Any]:
        code, python = code_folder(session, worker), session.record.python[worker]
        # The path of imports begins with the code, as the worker's own will.
        lines = 'cd "$1" && PYTHONPATH="$2${PYTHONPATH:+:$PYTHONPATH}" exec "$3" -m jaxops.launch.preflight "$4"'
        command = ["sh", "-c", lines, "sh", f"{code}/{session.record.inside}", code, python, *argv]
        known = {"limit": limit, "asked": time.time(), "code": code, "secrets": _secrets(session)}
        question = json.dumps({**asked(worker), **known}).encode()
        done = session.run(host, command, stdin=question, source="what to check (JSON)", timeout=limit + 30)
        try:
            answer: dict[str, Any] = json.loads(done.out.strip().splitlines()[-1])
        except (ValueError, IndexError):
            raise UserError(
                f"{host.name}: the preflight with {python} did not end well: {done.last_words} (is jaxops, of this"
                " version, in that environment?)"
            ) from None
        if answer.get("problems"):
            raise UserError("\n  ".join(f"{host.name}: {problem}" for problem in answer["problems"]))
        return answer

    return each(check, session.hosts)


def _meeting_point(session: Session) -> str:
    """Returns host:port for the workers of one attempt; empty where one worker is alone."""
    if len(session.hosts) == 1:
        return ""
    spec = session.record.spec
    address = spec.coordinator or (
        "HOST" if session.dry and not session.backend.on_this_machine else session.hosts[0].address()
    )
    return at_port(address, session.ask(0, "port", port=8476)["port"])


def environment(session: Session, worker: int) -> dict[str, str]:
    """Returns the variables of a worker: the job's, as `jaxops train` reads them, and where the code is."""
    spec = session.record.spec
    env = {"PYTHONPATH": code_folder(session, worker), "PYTHONUNBUFFERED": "1"}
    if spec.devices is not None:
        env["JAX_PLATFORMS"] = "cpu"
    count = len(session.hosts)
    # One worker alone is part of no job, even where the launcher is.
    place = (session.record.coordinator, str(count), str(worker)) if count > 1 else ("", "", "")
    attempt = {"attempt": session.record.attempt, "began": time.time()}
    env[VARIABLE] = json.dumps(launch_facts(session.record) | attempt)
    return env | dict(zip(("JAXOPS_COORDINATOR", "JAXOPS_NUM_PROCESSES", "JAXOPS_PROCESS_ID"), place, strict=True))


def _secrets(session: Session) -> dict[str, str]:
    """Returns the variables that are handed to the workers; they go over stdin alone."""
    return {name: os.environ.get(name, "") for name in session.record.spec.secrets}


def start_attempt(session: Session) -> None:
    """Begins a new attempt: notes it, and starts its workers. One that cannot be started is found missing later."""
    where = _meeting_point(session)
    session.note(state="running", attempt=session.record.attempt + 1, coordinator=where, status=None, why="")
    try:
        start_workers(session)
    except Unreachable as error:
        session.say(f"{error}; its worker counts as lost")


def start_workers(session: Session) -> None:
    """Starts the workers of the noted attempt; those that have been started before are left alone."""
    record = session.record

    def start(worker: int, host: Host) -> None:
        spec = {
            "argv": [record.python[worker], "-m", "jaxops", *record.spec.argv],
            "cwd": f"{code_folder(session, worker)}/{record.inside}",
            "env": environment(session, worker),
            "seconds": max(record.deadline - time.time(), 0.1),
            "grace": record.grace,
        }
        if session.dry:
            print(f"# worker {worker} on {host.name}: {json.dumps(spec)}\n", end="")
        spec["secrets"] = _secrets(session)
        source = "the worker (JSON)"
        answer = session.ask(worker, "start", record.folder(worker), stdin=json.dumps(spec).encode(), source=source)
        if answer.get("error"):
            raise RunFailed(f"{host.name}: the worker did not start: {answer['error']}")

    each(start, session.hosts)
