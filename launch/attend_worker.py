#!/usr/bin/env python3
"""Attends one worker that nobody drives: environment, preflight, training, its log, its heartbeat and its end.

It needs Python 3.8 and nothing else. `start_worker.sh` calls it, and worker.json beside it says what to run:

    attend_worker.py run CODE             runs the worker that the LAUNCH_ variables name; CODE is its unpacked code

SIGTERM reaches the training, so that it saves, and `grace` seconds later comes SIGKILL. The same happens `early`
seconds before the hours are used up, when the cluster takes the host away. It looks at the other workers in the
launch's folder: once one has not ended well, or has been silent for three minutes, this worker has 20 seconds to end by
itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

EXIT_USAGE, EXIT_SAVED, EXIT_LOST = 2, 75, 76
SETTLE_SECONDS, SILENT_SECONDS, BEAT_SECONDS, MEET_SECONDS, SETUP_SECONDS = 20.0, 180.0, 10.0, 600.0, 3600.0
MOST_SHIPPED = 8 << 20
"""Bytes of a log's end that are copied to an object store."""
PREEMPTED = (75, 129, 130, 137, 143)
EXIT_HOURS = 3
"""The status of a worker whose hours are used up, for a cluster that decides by it alone (see `_told_cluster`)."""


class Ended(Exception):
    """The worker ends before it trains: its exit status, and why."""

    def __init__(self, code, why):
        super().__init__(why)
        self.code, self.why = code, why


class Place:
    """The launch's folder, which is a shared file system or an object store, as start_worker.sh copies to it."""

    def __init__(self, folder, attempt, worker):
        self.folder, self.url = folder, "://" in folder
        self.attempt = f"{folder}/attempt-{attempt}"
        self.mine = f"{self.attempt}/worker-{worker}"
        self._scratch = os.path.join(os.environ["LAUNCH_WORK"], f"scratch-{worker}-{os.getpid()}")
        self._script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "start_worker.sh")

    def _copy(self, *words):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.call(["sh", self._script, *words], **quiet) == 0

    def write(self, name, data):
        if self.url:
            with open(self._scratch, "wb") as file:
                file.write(data)
            return self._copy("put", self._scratch, name)
        os.makedirs(os.path.dirname(name), exist_ok=True)
        scratch = f"{name}.{os.urandom(8).hex()}"
        with open(scratch, "wb") as file:
            file.write(data)
        os.replace(scratch, name)
        return True

    def read(self, name):
        if self.url:
            if not self._copy("get", name, self._scratch):
                return b""
            name = self._scratch
        try:
            with open(name, "rb") as file:
                return file.read()
        except OSError:
            return b""

    def json(self, name):
        try:
            return json.loads(self.read(name) or b"null")
        except ValueError:
            return None


class Attendant:
    """One worker of one attempt."""

    def __init__(self, spec, code):
        self.spec, self.code = spec, code
        self.number, self.count = int(os.environ["LAUNCH_WORKER"]), int(os.environ["LAUNCH_WORKERS"])
        self.place = Place(os.environ["LAUNCH_FOLDER"], os.environ["LAUNCH_ATTEMPT"], self.number)
        self.began = time.time()
        self.process, self.told, self.phase, self.over = None, 0.0, "setup", threading.Event()
        self.host = os.environ.get("LAUNCH_HOST_NAME") or socket.gethostname()
        if self.place.url:
            self.log_path = os.path.join(os.environ["LAUNCH_WORK"], f"log-{self.number}")
        else:
            self.log_path = self.place.mine + ".log"
            os.makedirs(self.place.attempt, exist_ok=True)
        self.log = open(self.log_path, "ab", buffering=0)  # noqa: SIM115  to the end of this process
        self.shipped = -1

    def run(self):
        """Runs the worker to its end, notes it, and returns its exit status."""
        signal.signal(signal.SIGTERM, self._terminate)
        begun = threading.Thread(target=self._beat, daemon=True)
        begun.start()
        try:
            self._forget_life_before()
            self.deadline = self._deadline()
            if time.time() >= self.deadline - self.spec["early"]:
                raise Ended(EXIT_SAVED, "max-hours")
            python = self._environment()
            meet = self._meeting_point()
            secrets = self._secrets()
            self._preflight(python, meet, secrets)
            code, why = self._train(python, meet, secrets)
        except Ended as end:
            code, why = end.code, end.why
            self._say(why)
        except OSError as error:
            code, why = EXIT_LOST, str(error)
            self._say(why)
        if self.told and not why and self._ended_peer():
            why = "others"  # the cluster ends the others of a job when one of its workers has failed
        self.over.set()
        begun.join(60)
        self._ship()
        end = {"code": code, "why": why, "host": self.host, "time": time.time()}
        for pause in (1, 5, 15, 0):
            if self.place.write(self.place.mine + ".json", json.dumps(end).encode()):
                break
            time.sleep(pause)
        return self._told_cluster(code, why)

    def _forget_life_before(self):
        """Takes back what this worker has left in an attempt that was suspended, as Kueue does it, and goes on now.

        In this order: the others take no meeting point while worker 0 counts as ended.
        """
        if not os.environ.get("LAUNCH_STATUS_DECIDES"):
            return
        names = [self.place.attempt + "/meet"] * (self.number == 0) + [self.place.mine + ".json"]
        for name in names:
            if self.place.read(name):
                self.place.write(name, b"null")

    def _ended_before(self, end):
        """Returns whether this is the end of an earlier life of a worker, before this one began."""
        return end is not None and end["time"] < self.began

    def _told_cluster(self, code, why):
        """Returns the status that this process ends with.

        A cluster that decides by it alone whether to try again (LAUNCH_STATUS_DECIDES) is told that the hours are over,
        and that a worker was lost where this one has failed while another one is being preempted.
        """
        if not os.environ.get("LAUNCH_STATUS_DECIDES"):
            return code
        if why == "max-hours":
            return EXIT_HOURS
        if self.count == 1 or code in (0, EXIT_SAVED, EXIT_LOST) or code >= 128:
            return code
        until = time.time() + 2  # the other one's heartbeat says so within a second
        while True:
            if self._preempted_peer():
                return EXIT_LOST
            if time.time() > until:
                break
            time.sleep(0.5)
        return code

    def _peers(self):
        """Yields, for each other worker, how it ended and its last heartbeat; None where there is none.

        It gives up after SETTLE_SECONDS: each look at an object store takes a second, and there may be a hundred.
        """
        until = time.time() + SETTLE_SECONDS
        for peer in range(self.count):
            if peer != self.number and time.time() < until:
                name = f"{self.place.attempt}/worker-{peer}"
                yield self.place.json(name + ".json"), self.place.json(name + ".beat")

    def _ended_peer(self):
        """Returns whether another worker has not ended well; on an object store nobody looks, for time is short."""
        return not self.place.url and any(end is not None and end["code"] for end, _ in self._peers())

    def _preempted_peer(self):
        for end, beat in self._peers():
            if end is not None and end["code"] in PREEMPTED and not end["why"]:
                return True
            if end is None and beat is not None and beat["phase"] == "stopping":
                return True
        return False

    def _say(self, text):
        self.log.write(f"launch: {text}\n".encode("utf-8", "replace"))

    def _terminate(self, *_):
        self.told = self.told or time.time()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def _beat(self):
        """Writes the heartbeat, at once where the phase has changed, and brings the log to an object store."""
        written, last = 0.0, ""
        while not self.over.is_set():
            phase = "stopping" if self.told else self.phase
            if phase != last or time.time() - written >= BEAT_SECONDS:
                last, written = phase, time.time()
                beat = {"time": written, "phase": phase, "host": self.host, "pid": os.getpid()}
                try:
                    self.place.write(self.place.mine + ".beat", json.dumps(beat).encode())
                    self._ship()
                    if not self.told and self.place.read(self.place.folder + "/stop"):
                        os.kill(os.getpid(), signal.SIGTERM)
                except OSError:
                    pass  # a file system that is away for a moment
            self.over.wait(0.5)

    def _ship(self):
        if not self.place.url:
            return
        with open(self.log_path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == self.shipped:
                return
            file.seek(max(0, size - MOST_SHIPPED))
            if self.place.write(self.place.mine + ".log", file.read()):
                self.shipped = size

    def _deadline(self):
        """Returns when the hours are used up: they count from the start of the first attempt."""
        given = os.environ.get("LAUNCH_DEADLINE")
        if given:
            return float(given)
        name = self.place.folder + "/started"
        found = self.place.json(name)
        if found is None:
            found = time.time()
            if self.number == 0:
                self.place.write(name, json.dumps(found).encode())
        return found + self.spec["hours"] * 3600

    def _call(self, argv, limit, what, question=b"", **more):
        """Runs a command beside the log, and returns its output; SIGTERM and the limit end it."""
        ways = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(argv, start_new_session=True, **ways, **more)
        if self.told:
            self.process.terminate()
        try:
            out = self.process.communicate(question, timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise Ended(EXIT_LOST, f"{what}: no end within {limit:.0f} s") from None
        if self.told:
            raise Ended(143, "told to stop before it had anything to save")
        return out

    def _environment(self):
        """Makes the environment from the lock file, unless a Python is named; returns the interpreter."""
        if self.spec["python"]:
            return self.spec["python"]
        import hashlib

        lock = os.path.join(self.code, self.spec["lock"])
        with open(lock, "rb") as file:
            parts = [file.read(), self.spec["accel"].encode(), self.spec["wheelhouse"].encode()]
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        folder = os.path.join(os.environ.get("LAUNCH_ENVS") or os.environ["LAUNCH_WORK"] + "/env", digest)
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "setup_host.sh")
        argv = ["sh", script, lock, folder] + [word for word in [self.spec["wheelhouse"]] if word]
        env = {**os.environ, "ACCEL": self.spec["accel"]}
        self._call(argv, SETUP_SECONDS, "setup_host.sh", env=env)
        if self.process.returncode:
            # What it fetches may be away for a moment; what it is given is wrong for ever.
            code = EXIT_USAGE if self.process.returncode == EXIT_USAGE else EXIT_LOST
            raise Ended(code, f"setup_host.sh ended with {self.process.returncode}: the log says why")
        return os.path.join(folder, "bin", "python")

    def _meeting_point(self):
        """Returns where the workers meet to look and to train; empty where jax finds the others by itself."""
        if self.count == 1 or self.spec["meet"] == "jax":
            return {}
        name = self.place.attempt + "/meet"
        if self.number == 0:
            address = os.environ.get("LAUNCH_ADDRESS") or self.spec["coordinator"] or _own_address()
            ports = [socket.socket() for _ in range(2)]
            for one in ports:
                one.bind(("", 0))
            address = f"[{address.strip('[]')}]" if ":" in address else address
            found = [f"{address}:{one.getsockname()[1]}" for one in ports]
            for one in ports:
                one.close()
            meet = {"preflight": found[0], "run": found[1]}
            self.place.write(name, json.dumps(meet).encode())
            return meet
        until = time.time() + MEET_SECONDS
        while time.time() < until and not self.told:
            meet = self.place.json(name)
            if meet is not None and not self._ended_before(self.place.json(f"{self.place.attempt}/worker-0.json")):
                return meet
            bad = self._bad_peer()
            if bad:
                raise Ended(EXIT_LOST, bad)
            time.sleep(1)
        if self.told:
            raise Ended(143, "told to stop before it had anything to save")
        raise Ended(EXIT_LOST, f"worker 0 did not come within {MEET_SECONDS:.0f} s")

    def _job(self, meet, what):
        env = {"PYTHONPATH": self.code, "PYTHONUNBUFFERED": "1"}
        if os.environ.get("PYTHONPATH"):
            env["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        if self.spec["devices"] is not None:
            env["JAX_PLATFORMS"] = "cpu"
        attempt = {"attempt": int(os.environ["LAUNCH_ATTEMPT"]), "began": self.began}
        env["JAXOPS_ATTEMPT"] = json.dumps({**self.spec.get("facts", {}), **attempt})
        env["JAXOPS_COORDINATOR"] = meet[what] if meet else ""
        env["JAXOPS_NUM_PROCESSES"], env["JAXOPS_PROCESS_ID"] = (
            (str(self.count), str(self.number)) if meet else ("", "")
        )
        return env

    def _secrets(self):
        """Returns the variables that come from where the launch says; no value of theirs is written anywhere."""
        return {name: _secret(name, source) for name, source in self.spec["secrets"].items()}

    def _preflight(self, python, meet, secrets):
        """Looks at the host, then meets the other workers, who must have found the same."""
        self.phase = "preflight"
        job = self._job(meet, "preflight")
        asked = {**self.spec["asked"], "env": job, "secrets": secrets, "code": self.code, "asked": time.time()}
        argv = [python, "-m", "jaxops.launch.preflight", "together"]
        cwd = os.path.join(self.code, self.spec["inside"])
        env = {**_surroundings(), "PYTHONPATH": job["PYTHONPATH"]}
        try:
            out = self._call(argv, asked["limit"] + 60, "preflight", json.dumps(asked).encode(), cwd=cwd, env=env)
        except FileNotFoundError:
            raise Ended(EXIT_USAGE, f"{python}: no such Python on {self.host}") from None
        try:
            answer = json.loads(out.decode("utf-8", "replace").strip().splitlines()[-1])
        except (ValueError, IndexError):
            if self.process.returncode == EXIT_LOST:
                raise Ended(EXIT_LOST, "preflight: the workers did not all meet") from None
            why = "preflight: it did not end well (exit status {}); is jaxops in {}?"
            raise Ended(EXIT_USAGE, why.format(self.process.returncode, python)) from None
        if answer["problems"]:
            raise Ended(EXIT_USAGE, "preflight on {}: {}".format(self.host, "; ".join(answer["problems"])))

    def _train(self, python, meet, secrets):
        """Runs `jaxops train` and returns its exit status and why it was ended."""
        self.phase = "running"
        argv = [python, "-m", "jaxops", *self.spec["argv"]]
        env = {**_surroundings(), **self._job(meet, "run"), **secrets}
        cwd = os.path.join(self.code, self.spec["inside"])
        self.process = subprocess.Popen(
            argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True
        )
        if self.told:
            self.process.terminate()
        why, looked, bad_since = "", 0.0, 0.0
        while True:
            try:
                code = self.process.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                pass
            now = time.time()
            if not self.told and now >= self.deadline - self.spec["early"]:
                why = "max-hours"
                self._terminate()
            if now - looked >= 5:
                looked, bad = now, self._bad_peer()
                bad_since = (bad_since or now) if bad else 0.0
                if bad and not self.told and now - bad_since >= SETTLE_SECONDS:
                    self._say(f"{bad}: this worker ends too")
                    why = "others"
                    self._terminate()
            if self.told and now - self.told >= self.spec["grace"]:
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.told and not why and not self.place.url and os.path.exists(self.place.attempt + "/late"):
            why = "max-hours"  # it is the cluster that told it, because the time is over
        return (128 - code if code < 0 else code), why

    def _bad_peer(self):
        """Returns what is wrong with another worker, in words; on an object store nobody looks."""
        if self.place.url:
            return ""
        for peer in range(self.count):
            if peer == self.number:
                continue
            name = f"{self.place.attempt}/worker-{peer}"
            end = self.place.json(name + ".json")
            if end is not None and not self._ended_before(end):
                if end["code"]:
                    return "worker {} ended with {}".format(peer, end["code"])
                continue
            try:
                last = os.stat(name + ".beat").st_mtime
            except OSError:
                continue
            silent = time.time() - last
            if last > self.began and silent > SILENT_SECONDS:
                return f"worker {peer} has been silent for {silent:.0f} s"
        return ""


def _surroundings():
    """Returns the variables of this process without Slurm's: by those jax would see one device of each host alone."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI_", "PMIX_"))}


def _own_address():
    """Returns the address of the interface that leads out of this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def _secret(name, source):
    """Reads the value of a secret: `env`, `file:PATH` of mode 0600, or `sm:NAME` of Google's Secret Manager."""
    kind, _, place = source.partition(":")
    if kind == "env":
        if name not in os.environ:
            raise Ended(EXIT_USAGE, f"--secret {name}: this worker has no such variable")
        return os.environ[name]
    if kind == "file":
        path = os.path.expanduser(place)
        try:
            with open(path, encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    raise Ended(EXIT_USAGE, f"--secret {name}: {path} can be read by others: chmod 600 it")
                return _text(name, file.read())
        except UnicodeDecodeError:  # whose message would show a part of it
            raise Ended(EXIT_USAGE, f"--secret {name}: {path} is no text in UTF-8") from None
        except OSError as error:
            raise Ended(EXIT_USAGE, f"--secret {name}: {error}") from None
    argv = ["gcloud", "--quiet", "secrets", "versions", "access", "latest", f"--secret={place}"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Ended(EXIT_LOST, f"--secret {name}: Secret Manager: {error}") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-300:]
        raise Ended(EXIT_USAGE, f"--secret {name}: Secret Manager refuses {place}: {said}")
    try:
        return _text(name, done.stdout.decode("utf-8"))
    except UnicodeDecodeError:
        raise Ended(EXIT_USAGE, f"--secret {name}: {place} in Secret Manager is no text in UTF-8") from None


def _text(name, value):
    """Returns a secret as it can stand in an environment variable: without the line feeds at its end."""
    if "\0" in value:
        raise Ended(EXIT_USAGE, f"--secret {name}: it holds a zero byte, which no environment variable can")
    return value.rstrip("\n")


if __name__ == "__main__":
    os.umask(0o077)
    if sys.argv[1:2] == ["run"] and len(sys.argv) == 3:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.json")) as text:
            given = json.load(text)
        sys.exit(Attendant(given, sys.argv[2]).run())
    else:
        sys.exit(__doc__)
