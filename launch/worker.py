#!/usr/bin/env python3
"""What `jaxops launch` does on a host: start one worker, say how it is, stop it, keep and unpack code.

It needs Python 3.8 and nothing else, and can be used by hand. Every call prints one JSON object and is safe to repeat:

    worker.py start ATTEMPT < '{"argv": [...], "env": {}, "secrets": {}, "cwd": ".", "seconds": 3600, "grace": 120}'
    worker.py poll ATTEMPT 0             state, exit status, and the log from this byte on (-1: from its end)
    worker.py stop ATTEMPT TERM|KILL     asks it to save, or ends it with its children
    worker.py keep FILE SHA256 < FILE    writes a whole file, if its digest is right
    worker.py unpack TAR SHA256 FOLDER   unpacks code whose digest is right
    worker.py shared FOLDER write|read|delete TOKEN
    worker.py port                       a free port
    worker.py remove FOLDER              removes a launch's folder, where none of its workers is alive

A worker lives in the folder ATTEMPT. Whether it lives is told by a lock that it holds on ATTEMPT/alive, never by a
process id, which another process may have by now. Its time is counted here, on the host: after `seconds` it gets
SIGTERM, so that it saves, and `grace` seconds later SIGKILL. ATTEMPT/beat is its heartbeat, for those who watch hosts.
"""

import fcntl
import json
import os
import signal
import sys
import time

# Other modules are imported where they are used: `poll` is called every few seconds, beside what trains.

MOST_LOG = 256 << 10
"""Bytes of a log that one poll returns."""
BEAT_SECONDS = 10.0
"""Seconds between two heartbeats: the age of ATTEMPT/beat, {"time", "pid"}, says whether the host still attends."""
STARTING = 10.0
"""Seconds after its folder is made in which a worker that holds no lock yet counts as running."""


def start(attempt):
    """Starts a worker from the JSON on stdin; does nothing where this attempt has been started before."""
    spec = json.load(sys.stdin)
    os.makedirs(os.path.dirname(attempt), exist_ok=True)
    try:
        os.mkdir(attempt, 0o700)  # of two calls one succeeds
    except FileExistsError:
        return {"started": False}
    ready, tell = os.pipe()
    if os.fork() == 0:
        os.close(ready)
        os.setsid()
        if os.fork() == 0:
            _supervise(attempt, spec, tell)
        os._exit(0)
    os.close(tell)
    os.wait()
    with os.fdopen(ready) as pipe:
        said = pipe.read()
    return {"started": True} if said == "ok" else {"started": False, "error": said or "its process ended at once"}


def _supervise(attempt, spec, tell):
    """Runs the worker to its end and notes its exit status; never returns."""
    import subprocess

    try:
        alive = os.open(os.path.join(attempt, "alive"), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(alive, fcntl.LOCK_EX)
        null, log = os.open(os.devnull, os.O_RDONLY), os.open(os.path.join(attempt, "log"), os.O_WRONLY | os.O_CREAT)
        for old, new in ((null, 0), (log, 1), (log, 2)):
            os.dup2(old, new)
        os.set_inheritable(alive, True)  # the worker holds the lock too, should this process be killed
        os.umask(USUAL)  # what a run writes is for whom its user always writes
        process = subprocess.Popen(
            spec["argv"],
            cwd=spec["cwd"],
            env=_environment(spec),
            pass_fds=[alive],
            start_new_session=True,
        )
        os.umask(0o077)
        _write(os.path.join(attempt, "pid"), str(process.pid).encode())
        os.write(tell, b"ok")
        os.close(tell)
    except OSError as error:
        _write(os.path.join(attempt, "status"), json.dumps({"code": 127, "why": str(error)}).encode())
        os.write(tell, str(error).encode())
        os._exit(1)
    why = ""
    code = _wait(process, attempt, spec["seconds"])
    if code is None:
        why = "max-hours"
        process.terminate()
        try:
            code = process.wait(spec["grace"])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    code = 128 - code if code < 0 else code
    _write(os.path.join(attempt, "status"), json.dumps({"code": code, "why": why}).encode())
    os._exit(0)


def _wait(process, attempt, seconds):
    """Waits for the worker with a heartbeat in ATTEMPT/beat; returns its status, None where its time is used up."""
    import contextlib
    import subprocess

    until = time.monotonic() + seconds
    while True:
        beat = {"time": time.time(), "pid": process.pid}
        with contextlib.suppress(OSError):  # a disk that is full for a moment
            _write(os.path.join(attempt, "beat"), json.dumps(beat).encode())
        left = until - time.monotonic()
        try:
            return process.wait(max(min(left, BEAT_SECONDS), 0))
        except subprocess.TimeoutExpired:
            if left <= BEAT_SECONDS:
                return None


def _environment(spec):
    env = {**os.environ, **spec["env"], **spec.get("secrets", {})}
    first = spec["env"].get("PYTHONPATH")
    if first:
        env["PYTHONPATH"] = os.pathsep.join([first, *filter(None, [os.environ.get("PYTHONPATH")])])
    return env


def poll(attempt, offset):
    """Returns {"state": absent | running | ended | lost, "code", "why", "text", "offset"}."""
    # In this order: a worker that ends in between has written its status, and its log, by then.
    alive, status = _is_alive(attempt), _read(os.path.join(attempt, "status"))
    text, end = _log(os.path.join(attempt, "log"), int(offset), ended=bool(status))
    found = {"state": "absent", "code": None, "why": "", "text": text, "offset": end}
    if status:
        return {**found, **json.loads(status), "state": "ended"}
    if not os.path.isdir(attempt):
        return found
    # Without a status and a lock it is being started at this moment, or was killed with what watched it.
    starting = abs(time.time() - os.stat(attempt).st_mtime) < STARTING
    return {**found, "state": "running" if alive or starting else "lost"}


def _log(path, offset, ended):
    try:
        with open(path, "rb") as file:
            offset = file.seek(offset) if offset >= 0 else file.seek(0, os.SEEK_END)
            data = file.read(MOST_LOG)
    except OSError:
        return "", offset
    whole = data if ended or len(data) == MOST_LOG else data[: data.rfind(b"\n") + 1]
    return whole.decode("utf-8", "replace"), offset + len(whole)


def stop(attempt, name):
    """Sends TERM to the worker, or KILL to it and its children; does nothing where it has ended."""
    pid = _read(os.path.join(attempt, "pid"))
    if not pid or not _is_alive(attempt):
        return {"stopped": False}
    try:
        if name == "KILL":
            os.killpg(int(pid), signal.SIGKILL)
        else:
            os.kill(int(pid), signal.SIGTERM)
    except ProcessLookupError:
        return {"stopped": False}
    return {"stopped": True}


def _is_alive(attempt):
    """Returns whether a process of the attempt holds its lock."""
    try:
        with open(os.path.join(attempt, "alive"), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def keep(path, digest):
    """Writes stdin to a file, if its SHA-256 is right; a file that is there with this digest is left alone."""
    import hashlib

    data = sys.stdin.buffer.read()
    if data and hashlib.sha256(data).hexdigest() != digest:
        return {"error": f"{path}: what arrived is damaged (its SHA-256 is not {digest})"}
    if _digest(path) == digest:
        return {"kept": True}
    if not data:
        return {"kept": False}
    os.umask(USUAL)  # the workers of other hosts may be other users
    os.makedirs(os.path.dirname(path), exist_ok=True)
    _write(path, data)
    return {"kept": True}


def unpack(tar, digest, folder):
    """Unpacks a tar whose SHA-256 is right into a folder, which appears whole or not at all."""
    import shutil
    import tarfile

    if os.path.isdir(folder):
        return {"unpacked": folder}
    found = _digest(tar)
    if found != digest:
        return {"error": "{}: its SHA-256 is {}, expected {}".format(tar, found or "of no file", digest)}
    scratch = f"{folder}.{os.urandom(8).hex()}"
    with tarfile.open(tar) as file:
        names = file.getnames()
        if any(name.startswith("/") or ".." in name.split("/") for name in names):
            return {"error": f"{tar}: it holds a path outside of its folder"}
        file.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    try:
        os.rename(scratch, folder)
    except OSError:  # another call was faster
        shutil.rmtree(scratch, ignore_errors=True)
    return {"unpacked": folder}


def shared(folder, action, token):
    """Writes, reads or deletes a tiny file, by which several hosts see whether a folder is the same for all."""
    path = os.path.join(folder, f".launch-{token}")
    if action == "write":
        os.umask(USUAL)  # the workers of other hosts may be other users
        os.makedirs(folder, exist_ok=True)
        _write(path, token.encode())
    elif action == "delete":
        if os.path.exists(path):
            os.unlink(path)
        return {"seen": False}
    return {"seen": _read(path) == token.encode()}


def port():
    """Returns a port that is free now."""
    import socket

    with socket.socket() as free:
        free.bind(("", 0))
        return {"port": free.getsockname()[1]}


def remove(folder):
    """Removes the folder of a launch, unless one of its workers is alive."""
    import shutil

    for path, _, names in os.walk(folder):
        if "alive" in names and _is_alive(path):
            return {"error": f"{path}: its worker is still alive"}
    shutil.rmtree(folder, ignore_errors=True)
    return {"removed": not os.path.exists(folder)}


def _read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _digest(path):
    """Returns the SHA-256 of a file; empty where there is none."""
    import hashlib

    total = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                total.update(block)
    except OSError:
        return ""
    return total.hexdigest()


def _write(path, data):
    """Writes a whole file: a reader, or a kill, finds the old one or the new one."""
    scratch = f"{path}.{os.urandom(8).hex()}"
    with open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


VERBS = {verb.__name__: verb for verb in (start, poll, stop, keep, unpack, shared, port, remove)}

if __name__ == "__main__":
    USUAL = os.umask(0o077)  # what is kept here is for this user alone
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        sys.exit(__doc__)
    try:
        print(json.dumps(VERBS[sys.argv[1]](*sys.argv[2:])))
    except OSError as problem:
        print(json.dumps({"error": str(problem)}))
