"""`sbatch`, `squeue` and `scancel` as far as a sweep uses them: tasks of an array are processes of this machine.

As in Slurm's manual pages: `sbatch --parsable` prints the number of the job; each task gets SLURM_ARRAY_JOB_ID and
SLURM_ARRAY_TASK_ID and no more than the number behind `%` run at a time; `squeue --array` lists tasks that wait or run,
one a line, and forgets the others; `scancel --state=PENDING` takes back what waits, `--batch --signal` signals the
shell of the script alone.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("FAKE_SLURM", "."))


def install(home: Path) -> dict[str, str]:
    """Writes the commands, and returns the variables with which they are found."""
    (home / "bin").mkdir(parents=True)
    for name in ("sbatch", "squeue", "scancel"):
        path = home / "bin" / name
        lines = [
            f"#!{sys.executable} -S",
            "import sys",
            f"sys.path.insert(0, {os.path.dirname(__file__)!r})",
            "import fake_slurm",
            f"fake_slurm.main([{name!r}, *sys.argv[1:]])",
        ]
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o755)
    return {"FAKE_SLURM": str(home), "PATH": os.pathsep.join([str(home / "bin"), os.environ["PATH"]])}


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    job = 1 + len(list(HOME.glob("*.job")))
    first, last, most = map(int, re.search(r"#SBATCH --array=(\d+)-(\d+)%(\d+)", text).groups())
    name, comment = (re.search(rf"#SBATCH --{key}=(\S+)", text)[1] for key in ("job-name", "comment"))
    tasks = {str(index): "PENDING" for index in range(first, last + 1)}
    (HOME / f"{job}.job").write_text(
        json.dumps({"name": name, "comment": comment, "most": most, "script": script, "tasks": tasks})
    )
    with open(HOME / "controller.log", "ab") as said:
        subprocess.Popen(
            [sys.executable, "-S", __file__, "control", str(job)], start_new_session=True, stdout=said, stderr=said
        )
    print(job)


def control(job: str) -> None:
    """Runs the tasks of a job, in the place of slurmctld and slurmd."""
    file, running = HOME / f"{job}.job", {}
    while True:
        found = json.loads(file.read_text())
        for index, process in list(running.items()):
            if process.poll() is not None:
                found["tasks"].pop(index, None)
                del running[index]
        for index, state in found["tasks"].items():
            if state == "PENDING" and len(running) < found["most"] and not (HOME / f"{job}_{index}.cancel").exists():
                env = {**os.environ, "SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": index}
                running[index] = subprocess.Popen(["bash", found["script"]], env=env, start_new_session=True)
                (HOME / f"{job}_{index}.pid").write_text(str(running[index].pid))
                found["tasks"][index] = "RUNNING"
        found["tasks"] = {
            index: state
            for index, state in found["tasks"].items()
            if not (state == "PENDING" and (HOME / f"{job}_{index}.cancel").exists())
        }
        file.with_suffix(".new").write_text(json.dumps(found))
        os.replace(file.with_suffix(".new"), file)
        if not found["tasks"]:
            return
        time.sleep(0.02)


def squeue(name: str) -> None:
    for file in HOME.glob("*.job"):
        found = json.loads(file.read_text())
        for index in found["tasks"] if found["name"] == name else ():
            print(f"{file.stem}_{index}|{found['comment']}")


def scancel(arguments: list[str]) -> None:
    *flags, task = arguments
    job, _, index = task.partition("_")
    state = json.loads((HOME / f"{job}.job").read_text())["tasks"].get(index)
    if state == "PENDING" and "--batch" not in flags:
        (HOME / f"{task}.cancel").touch()
    elif state == "RUNNING" and "--state=PENDING" not in flags:
        pid = int((HOME / f"{task}.pid").read_text())
        if "--batch" in flags:
            os.kill(pid, signal.SIGTERM)
        else:
            os.killpg(pid, signal.SIGKILL)


def main(argv: list[str]) -> None:
    command, *arguments = argv
    if command == "control":
        control(arguments[0])
    elif command == "sbatch":
        sbatch(arguments[-1])
    elif command == "squeue":
        squeue(next(a.partition("=")[2] for a in arguments if a.startswith("--name=")))
    else:
        scancel(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
