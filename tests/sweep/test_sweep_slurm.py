"""A sweep as a Slurm job array: its tasks outlive the sweep's process, and none is submitted twice.

With a stand-in of three commands, and, slow, with a real slurmctld and slurmd where they are installed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest
from stand_in import SEARCH, TASK

from jaxops.cli.main import main
from jaxops.sweep.plan import make_plan
from jaxops.sweep.records import SweepFolder, read_plan
from jaxops.sweep.runners import LocalRunner
from jaxops.sweep.slurm import SlurmRunner
from jaxops.sweep.spec import Slurm
from jaxops.sweep.work import Sweep

ROOT = Path(__file__).parents[2]
SWEEP = """\
base: toy.yaml
runs: {grid: {optimizer.lr: [1.0, 2.0, 4.0]}, seeds: 2}
runner: {kind: slurm, jobs: 3, hours: 0.5, setup: ['echo prepared'], options: {nice: 0}}
"""


@pytest.fixture
def cluster(toy, tmp_path, monkeypatch):
    """The stand-in for Slurm, a sweep of six points, and a training that takes a moment."""
    for name, value in fake_slurm.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jaxops.sweep.slurm.LOOK", 0.1)
    monkeypatch.setattr("jaxops.sweep.work.POLL", 0.02)
    Path("many.yaml").write_text(SWEEP)
    Path("task.py").write_text(TASK)
    return toy


def work(*overrides: str, command=("task.py",)):
    """Works on the sweep in this process; returns whether it was done, and what was said."""
    plan, said = make_plan("many.yaml", overrides), []
    folder = SweepFolder(plan.folder)
    folder.begin(plan)
    runner = SlurmRunner(folder, plan.runner, len(plan.points), [sys.executable, "-S", *command])
    return Sweep(plan, folder, runner, said.append).run(), said


def jobs() -> list[dict]:
    return [json.loads(file.read_text()) for file in Path("slurm").glob("*.job")]


def started() -> list[str]:
    return Path("started.txt").read_text().split() if Path("started.txt").exists() else []


def states() -> set[str]:
    plan = read_plan(Path("runs/many"))
    return {SweepFolder(plan.folder).state(point)[0] for point in plan.points}


def test_the_points_that_are_missing_are_one_array(cluster):
    whole, said = work()
    assert whole and states() == {"finished"} and len(jobs()) == 1
    assert len(started()) == len(set(started())) == 6 and said[-1].endswith("6 of 6")
    (script,) = Path("runs/many/.sweep/slurm").glob("*.sbatch")
    text = script.read_text()
    assert "#SBATCH --array=0-5%3" in text and "#SBATCH --time=0:30:00" in text and "#SBATCH --nice=0" in text
    assert all(log.read_text().startswith("prepared\n") for log in Path("runs/many/logs").glob("*.txt"))
    assert work()[0] and len(jobs()) == 1
    work("runs.seeds=3")
    assert len(jobs()) == 2 and len(set(started())) == len(started()) == 9


def test_a_task_that_fails_is_told_with_what_it_said(cluster):
    Path("task.py").write_text("import sys\nsys.exit('jaxops: no column user')\n")
    whole, said = work()
    assert whole and states() == {"failed"}
    assert any("exit status 1): no column user" in line for line in said)


def test_asked_to_stop_it_has_the_tasks_save_and_takes_back_those_that_wait(cluster):
    Path("task.py").write_text(TASK.replace("time.sleep(0.06)", "time.sleep(1.5)"))
    plan = make_plan("many.yaml")
    folder = SweepFolder(plan.folder)
    folder.begin(plan)

    class Stopping(SlurmRunner):
        def alive(self):
            if len(started()) == 3:
                folder.ask_to_stop()
            return super().alive()

    runner = Stopping(folder, plan.runner, 6, [sys.executable, "-S", "task.py"])
    assert not Sweep(plan, folder, runner, lambda line: None).run()
    assert len(started()) == 3 and states() == {"unfinished", "waiting"}
    summaries = [json.loads(file.read_text()) for file in Path("runs/many").glob("*/summary.json")]
    assert [summary["state"] for summary in summaries] == ["preempted"] * 3
    Path("task.py").write_text(TASK)
    assert work()[0] and states() == {"finished"} and len(started()) == 9


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("when", ["while they run", "before the number was noted"])
def test_the_next_process_takes_over_tasks_that_run(cluster, when):
    Path("task.py").write_text(TASK.replace("time.sleep(0.06)", "time.sleep(0.2)"))
    plan = make_plan("many.yaml")
    folder = SweepFolder(plan.folder)
    folder.begin(plan)

    class Dies(SlurmRunner):
        def submit(self):
            super().submit()
            if when.startswith("before"):
                for record in self._place.glob("*.json"):
                    record.unlink()
            raise Killed

    runner = Dies(folder, plan.runner, 6, [sys.executable, "-S", "task.py"])
    sweep = Sweep(plan, folder, runner, lambda line: None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("jaxops.sweep.slurm._Task.kill", lambda self: None)  # nothing is done by who is killed
        sweep.run()
    whole, said = work()
    assert whole and states() == {"finished"} and len(jobs()) == 1
    assert len(started()) == len(set(started())) == 6
    assert sum("goes on where an earlier process started it" in line for line in said) == 6


def test_a_task_that_is_gone_without_a_word_can_go_on(cluster):
    Path("task.py").write_text("import os, signal\nos.killpg(0, signal.SIGKILL)\n")
    whole, said = work()
    assert (
        whole
        and states() == {"waiting"}
        and sum("is gone (cancelled, or ended by a limit" in line for line in said) == 6
    )


@pytest.mark.parametrize(
    ("runner", "said"),
    [
        ("{kind: slurm}", "hours"),
        ("{kind: slurm, hours: 0}", "greater than 0"),
        ("{kind: slurm, hours: 1, options: {array: 0-9}}", "array is set by the sweep itself"),
        ("{kind: slurm, hours: 1, options: {mem: '1G --wrap=x'}}", "expected one word"),
        ("{kind: launch, hours: 1}", "runner"),
    ],
)
def test_a_wrong_runner_is_told(toy, capsys, runner, said):
    Path("many.yaml").write_text(SWEEP[: SWEEP.index("runner")] + f"runner: {runner}\n")
    assert main(["sweep", "many.yaml"]) == 2
    assert said in capsys.readouterr().err and not Path("runs").exists()


def test_without_slurm_it_is_told(toy, capsys, monkeypatch):
    Path("many.yaml").write_text(SWEEP)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["sweep", "many.yaml"]) == 2
    assert "sweep from a login node of the cluster" in capsys.readouterr().err


def test_a_point_runs_by_a_launch(toy, monkeypatch):
    """The command is what one would type, with all of this machine's cores: what trains is elsewhere."""
    Path("many.yaml").write_text(
        SWEEP[: SWEEP.index("runner")]
        + "runner: {kind: launch, on: cpu-8, backend: local, hours: 2, jobs: 2, flags: [--spot]}\n"
    )
    made = []
    monkeypatch.setattr(
        LocalRunner, "start", lambda self, point, config, claim, given_up=None: made.append(self) or Ended()
    )
    assert main(["sweep", "many.yaml"]) in (0, 75)
    command = made[0]._command
    assert command[1:4] == ["-m", "jaxops", "launch"] and made[0].slots == 2 and not made[0]._free[0].cores
    assert command[4:] == ["--on", "cpu-8", "--backend", "local", "--max-hours", "2", "--spot"]


class Ended:
    def poll(self):
        from jaxops.sweep.records import PointEnd

        return PointEnd(75)

    def stop(self): ...

    def kill(self): ...


@pytest.mark.slow
def test_a_real_slurm_runs_a_sweep_whose_controller_is_killed(toy, tmp_path):
    sys.path.insert(0, str(ROOT / "tests" / "launch"))
    try:
        slurm_cluster = pytest.importorskip("slurm_cluster", reason="the cluster of tests/launch is not there")
    finally:
        sys.path.pop(0)
    Path("many.yaml").write_text(SWEEP.replace("options: {nice: 0}", "options: {ntasks: 1}"))
    Path("task.py").write_text(TASK.replace("time.sleep(0.06)", "time.sleep(2)"))
    Path("drive.py").write_text(
        "import sys\nfrom jaxops.sweep import slurm\nslurm.LOOK = 1.0\nimport jaxops.cli.sweep as command\n"
        "made = command._runner\n"
        "def runner(args, plan, folder):\n    found = made(args, plan, folder)\n"
        "    found._command = [sys.executable, '-S', 'task.py']\n    return found\n"
        "command._runner = runner\nfrom jaxops.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    with slurm_cluster.slurm(tmp_path / "cluster") as variables:
        path = os.pathsep.join([str(ROOT), os.getcwd()])
        env = {**os.environ, **variables, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        begin = lambda *more: subprocess.Popen(
            [sys.executable, "drive.py", "sweep", "many.yaml", *more],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        first = begin()
        end = time.monotonic() + 120
        while not started() and first.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        out, err = begin("--json").communicate(timeout=240)
        assert {point["state"] for point in json.loads(out)["points"]} == {"finished"}, err
        assert "goes on where an earlier process started it" in err
        assert len(started()) == len(set(started())) == 6
        Path("find.yaml").write_text(SEARCH.replace("trials: 12", "trials: 6"))
        Path("many.yaml").write_text(
            SEARCH.replace("trials: 12", "trials: 6") + "runner: {kind: slurm, jobs: 3, hours: 0.5}\nname: search\n"
        )
        out, err = begin("--json").communicate(timeout=240)
        found = json.loads(out)["points"]
        assert {point["state"] for point in found} <= {"finished", "pruned"} and len(found) == 6, err
    assert isinstance(Slurm(hours=1.0).options, dict)
