"""A stand-in for the Python of a host, so that a whole launch takes a second: its `train` counts to `steps`.

It answers the preflight, and as a worker it takes a lock that two of one rank cannot have, counts on in a file in
run.dir, and saves at SIGTERM. `FAKE` in the environment says what goes wrong.
"""

import dataclasses
import fcntl
import json
import subprocess
import sys
from pathlib import Path

from jaxops.launch.code import Code, bundle
from jaxops.launch.engine import launch, open_session, supervise
from jaxops.launch.follow import Follower
from jaxops.launch.record import LaunchFolder, LaunchRecord, Spec
from jaxops.launch.scheduled import ScheduledLaunch, open_scheduled, submit
from jaxops.launch.session import Session

STEPS = 20
PYTHON = """#!{python} -S
import fcntl, json, os, signal, sys, time

if sys.argv[1:2] == ["-S"]:  # a host script, which any Python can run
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
own = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "fake.json")
own = json.load(open(own)) if os.path.exists(own) else {{}}
mode = os.environ.get("FAKE") or own.get("mode", "")
if "jaxops.launch.preflight" in sys.argv:
    asked = json.load(sys.stdin)
    if mode == "hold":
        time.sleep(600)
    facts = {{"jax": str(os.getpid()) if mode == "disagree" else "1"}}
    problems = ["disk: full"] if mode == "full" else []
    print(json.dumps({{"problems": problems, "facts": facts, "clock": time.time(), "asked": asked["asked"]}}))
    sys.exit()

place = next(word for word in sys.argv if word.startswith("run.dir=")).partition("=")[2]
rank = os.environ["JAXOPS_PROCESS_ID"] or os.environ["LAUNCH_WORKER"]  # on chips jax finds the others itself
path = lambda name: os.path.join(place, name + "-" + rank)
if os.environ.get("TOKEN", "")[::-1] == "2retnuh2retnuh":
    open(path("token"), "w").close()
with open(path("starts"), "a") as file:
    file.write(os.getcwd() + "\\n")
alone = open(path("lock"), "w")
try:
    fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    open(path("twice"), "w").close()
    sys.exit(2)
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(75)))
if mode in ("1", "2", "76") and rank == "0":
    sys.exit(int(mode))
step = int(open(path("steps")).read()) if os.path.exists(path("steps")) else 0
print("from step", step, flush=True)
while step < {steps}:
    time.sleep(own.get("pause", 0.05))
    step += 1
    with open(path("new"), "w") as file:
        file.write(str(step))
    os.replace(path("new"), path("steps"))
print("done", flush=True)
"""


@dataclasses.dataclass
class Scene:
    """A repository, a folder of runs and a stand-in of Python, in one folder, whose launch takes a second."""

    home: Path
    workers: int = 2

    def make(self) -> "Scene":
        self.code_folder.mkdir(parents=True)
        subprocess.run(["git", "init", "-q", self.code_folder], check=True)
        (self.code_folder / "my.yaml").write_text("task: rec\n")
        self.python.write_text(PYTHON.format(python=sys.executable, steps=STEPS))
        self.python.chmod(0o755)
        return self

    def fail(self, code: int) -> None:
        """Lets worker 0 end with this status, on hosts that have no variable of this process."""
        (self.home / "fake.json").write_text(json.dumps({"mode": str(code)}))

    def hold(self) -> None:
        """Lets workers begin only on the whole slice, as chips do: the preflight of one alone does not end."""
        (self.home / "fake.json").write_text(json.dumps({"mode": "hold"}))

    def slow(self, pause: float) -> None:
        """Lets a step take so many seconds."""
        (self.home / "fake.json").write_text(json.dumps({"pause": pause}))

    @property
    def code_folder(self) -> Path:
        return self.home / "code"

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def python(self) -> Path:
        return self.home / "python"

    def record(self, **changes) -> LaunchRecord:
        spec = Spec(
            name="tiny",
            run_dir=str(self.runs),
            backend="local",
            hosts=tuple(f"local-{n}" for n in range(self.workers)),
            type="cpu-4",
            argv=("train", "my.yaml", f"run.dir={self.runs}"),
            devices=2,
            mesh={"data": 4},
            python=str(self.python),
        )
        return LaunchRecord(spec=dataclasses.replace(spec, **changes), grace=5, retries=1)

    @property
    def folder(self) -> LaunchFolder:
        return LaunchFolder(self.record().spec.id)

    def code(self) -> Code:
        return bundle(self.code_folder)

    def launch(self, hours: float = 1.0, watch: bool = True, **changes) -> tuple[Session, int | None]:
        """`jaxops launch`, in this process."""
        fresh = self.record(**changes)
        folder = LaunchFolder(fresh.spec.id)
        with folder.held():
            session = open_session(folder, fresh, lambda line: print(line, file=sys.stderr, flush=True))
            adopted = launch(session, self.code(), fresh, hours)
            return session, supervise(session, self.code(), 0.05, adopted) if watch else None

    def submit(self, hours: float = 1.0, watch: bool = True, pause: float = 0.2, **changes) -> int | None:
        """`jaxops launch` with a backend that starts the workers by itself, in this process."""
        fresh = self.record(**changes)
        folder = LaunchFolder(fresh.spec.id)
        with folder.held():
            opened = open_scheduled(folder, fresh, lambda line: print(line, file=sys.stderr, flush=True))
            adopted = submit(opened, self.code(), fresh, hours)
            return Follower(opened, pause, adopted).follow() if watch else None

    def scheduled(self) -> ScheduledLaunch:
        """The launch as `jaxops job` finds it, of a backend that starts the workers by itself."""
        record = self.folder.load()
        assert record is not None
        return ScheduledLaunch(self.folder, record, lambda line: None)

    def session(self) -> Session:
        """The launch as `jaxops job` finds it."""
        record = self.folder.load()
        assert record is not None
        return Session(self.folder, record, lambda line: None)

    def steps(self, rank: int = 0) -> int:
        path = self.runs / f"steps-{rank}"
        return int(path.read_text()) if path.exists() else 0

    def starts(self, rank: int = 0) -> int:
        path = self.runs / f"starts-{rank}"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def alive(self) -> list[int]:
        """The workers that live, by the locks that they hold."""
        found = []
        for rank in range(self.workers):
            try:
                with open(self.runs / f"lock-{rank}", "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(rank)
            except FileNotFoundError:
                pass
        return found


if __name__ == "__main__":
    _, status = Scene(Path(sys.argv[1])).launch()
    sys.exit(status)
