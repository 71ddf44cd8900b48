"""A sweep at work: what is missing is run, what failed is told, and nothing is run twice. Real processes are slow."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.core.metrics_file import read_metrics
from jaxops.sweep import points
from jaxops.sweep.plan import make_plan
from jaxops.sweep.records import PointEnd, SweepFolder, read_plan
from jaxops.sweep.runners import JobShare, gpus_here, shares
from jaxops.sweep.work import Sweep

ROOT = Path(__file__).parents[2]


def swept(capsys, *arguments: str) -> tuple[int, dict, str]:
    """The exit status of a sweep in this process, what it came to, and what it said."""
    status = main(["sweep", *arguments, "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else {}, err


def states(found: dict) -> list[str]:
    return [point["state"] for point in found["points"]]


HERE = ["runner.kind=in_process"]


def test_the_same_file_again_runs_what_is_missing(toy, quick_fit, capsys):
    """And a larger grid its new points alone: wandb/wandb#2783 runs the overlap again."""
    assert not Path("runs").exists() and main(["sweep", "lr.yaml", "--dry-run"]) == 0 and not Path("runs").exists()
    capsys.readouterr()
    status, found, _ = swept(capsys, "lr.yaml", *HERE, "runs.seeds=1")
    assert status == 0 and states(found) == ["finished"] * 2
    written = {path: path.stat().st_mtime_ns for path in Path("runs/lr").glob("*/metrics.jsonl")}
    assert len(written) == 2

    status, more, said = swept(capsys, "lr.yaml", *HERE, "runs.seeds=1", "letters=8")
    assert status == 0 and " begins" not in said and more["points"] == found["points"]

    text = Path("lr.yaml").read_text().replace("[1.0, 4.0]", "[2.0, 4.0]")
    Path("lr.yaml").write_text(text)
    status, more, said = swept(capsys, "lr.yaml", *HERE, "runs.seeds=1")
    assert status == 0 and said.count(" begins") == 1 and "optimizer.lr=2.0" in said
    assert f"{found['points'][0]['id']} is no point of this sweep any more" in said
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert more["points"][1] == found["points"][1]
    summary = json.loads(Path(more["points"][1]["dir"], "summary.json").read_text())
    assert more["points"][1]["value"] == summary["valid/nll"] and more["winner"] is None
    assert "one seed does not say what seeds do" in more["verdict"]


@pytest.mark.parametrize("searches", [False, True])
def test_a_field_that_is_newer_than_a_folder_leaves_its_runs_what_they_are(toy, quick_fit, capsys, searches):
    """A new jaxops has a new key with a default: every id would be another, and the folder another sweep."""
    file = "find.yaml" if searches else "lr.yaml"
    more = ["search.trials=4"] if searches else []

    def older(resolved):
        return {name: value for name, value in resolved.items() if name != "letters"}

    with pytest.MonkeyPatch.context() as patch:  # a version whose config had no `letters` yet
        digest = points._digest_without
        patch.setattr(points, "_digest_without", lambda resolved, names: digest(older(resolved), names))
        status, before, _ = swept(capsys, file, *HERE, *more)
    assert status == 0 and len(before["points"]) == 4
    for config in Path("runs").glob("*/*/config.yaml"):
        config.write_text(config.read_text().replace("letters: 8\n", ""))
        assert points.run_id(yaml.safe_load(config.read_text())) == config.parent.name

    status, found, said = swept(capsys, file, "--status", *HERE, *more)
    assert status == 0 and found["points"] == before["points"] and found["verdict"] == before["verdict"]
    status, found, said = swept(capsys, file, *HERE, *more)
    assert status == 0 and " begins" not in said and found["points"] == before["points"]
    larger = ["search.trials=6"] if searches else ["runs.seeds=3"]
    status, found, said = swept(capsys, file, *HERE, *larger)
    assert status == 0 and said.count(" begins") == 2 and states(found) == ["finished"] * 6
    changed = ["letters=6", *more]
    assert main(["sweep", file, *HERE, *changed]) == 2  # another value than the default is another run
    assert "another base config" in (said := capsys.readouterr().err) or "folder of another sweep" in said


def test_a_failed_point_is_told_with_its_reason_and_the_others_go_on(toy, quick_fit, capsys):
    """facebookresearch/hydra#3227: their logs are empty; ray-project/ray#16891: failed ones never run again."""
    Path("broken.yaml").write_text(
        "base: toy.yaml\nruns:\n  grid: {optimizer.lr: [200.0, 300.0, 4.0]}\nrunner: {kind: in_process}\n"
    )
    status, found, said = swept(capsys, "broken.yaml")
    assert status == 1 and states(found) == ["failed", "failed", "finished"]
    for point in found["points"][:2]:
        assert "not finite at step 4" in point["reason"] and point["id"] in said
        assert "RunFailed" in Path("runs/broken/logs", f"{point['id']}.txt").read_text()
    assert found["points"][2]["value"] is not None and found["points"][0]["value"] is None

    status, again, said = swept(capsys, "broken.yaml")
    assert status == 1 and " begins" not in said and said.count("has failed before") == 2
    assert again["points"] == found["points"]
    status, _, said = swept(capsys, "broken.yaml", "--retry-failed")
    assert status == 1 and said.count(" goes on") + said.count(" begins") == 2


def test_a_changed_base_does_not_mix_with_an_old_folder(toy, capsys):
    """ray-project/ray#30584 takes the old folder and ignores what was changed."""
    folder, plan = SweepFolder(Path("runs/lr")), make_plan("lr.yaml")
    folder.begin(plan)
    (folder.path / plan.points[0].id).mkdir()  # something was trained
    status, _, said = swept(capsys, "lr.yaml", "letters=6")
    assert status == 2 and "none of its 4 points is among these 4" in said and "set name=NAME" in said
    assert read_plan(folder.path).points == plan.points
    Path("runs/other").mkdir()
    Path("runs/other/notes.txt").write_text("mine")
    assert swept(capsys, "lr.yaml", "name=other")[0] == 2
    assert [path.name for path in Path("runs/other").iterdir()] == ["notes.txt"]


def test_runs_of_other_code_are_not_put_into_one_table_in_silence(toy, quick_fit, capsys):
    """The ids do not tell: what they are made of is the config, which names the code and does not hold it."""
    assert swept(capsys, "lr.yaml", *HERE, "runs.seeds=1")[0] == 0
    family = Path("toy_family.py")
    family.write_text(family.read_text() + "# another loss\n")
    status, found, said = swept(capsys, "lr.yaml", *HERE)
    assert status == 2 and "2 run(s) of this sweep were trained with other code" in said and "SHA-256" in said
    assert not found and len([*Path("runs/lr").glob("*/config.yaml")]) == 2
    assert swept(capsys, "lr.yaml", *HERE, "--accept-code")[0] == 0
    assert len([*Path("runs/lr").glob("*/config.yaml")]) == 4


def test_a_part_of_a_job_of_several_processes_does_not_sweep(toy, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-4]")
    assert main(["sweep", "lr.yaml"]) == 2 and not Path("runs").exists()
    assert "this one of several processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lr.yaml", "--status"], "this sweep has not begun"),
        (["lr.yaml", "--statsu"], "did you mean '--status'?"),
        (["lr.yaml", "--status", "--best"], "not allowed with argument"),
        (["nowhere.yaml"], "no such configuration"),
        (["lr.yaml", "run.name=mine"], "a sweep names its runs itself"),
        (["lr.yaml", "optimizer.lrr=1.0"], "did you mean 'lr'?"),
    ],
)
def test_a_wrong_command_is_one_message(toy, capsys, arguments, said):
    assert main(["sweep", *arguments]) == 2
    out, err = capsys.readouterr()
    assert said in err and not out and "Traceback" not in err and not Path("runs").exists()


def test_train_says_what_to_type_where_several_values_are_given(toy, capsys):
    assert main(["train", "toy.yaml", "optimizer.lr=1e-4,1e-3", "run.seed=0..2"]) == 2
    said = capsys.readouterr().err
    assert "expected a number" in said
    assert said.endswith("Several values are a sweep: jaxops sweep toy.yaml optimizer.lr=1e-4,1e-3 run.seed=0..2\n")
    assert main(["train", "lr.yaml"]) == 2
    assert capsys.readouterr().err.endswith("This file is a sweep: jaxops sweep lr.yaml\n")
    assert main(["train", "toy.yaml", "optimizer.lr=fast"]) == 2
    assert "sweep" not in capsys.readouterr().err


def test_a_folder_of_somebody_elses_is_read_and_never_run(toy, capsys):
    SweepFolder(Path("runs/lr")).begin(make_plan("lr.yaml"))
    assert main(["sweep", "runs/lr", "--status"]) == 0
    assert "4 waiting" in capsys.readouterr().out
    assert main(["sweep", "runs/lr"]) == 2 and "is run by its file" in capsys.readouterr().err
    file = Path("runs/lr/sweep.json")
    odd = [file.read_text().replace(a, b) for a, b in (('"seed": 1', '"seed": []'), ('"lower"', '"best"'))]
    for text in ("{", '{"version": 9}', file.read_text().replace('"id": "', '"id": "../'), "[]", *odd):
        file.write_text(text)
        assert main(["sweep", "runs/lr", "--best"]) == 2
        assert "Traceback" not in capsys.readouterr().err


class Slow:
    """A runner whose points take a moment and leave a finished run; it notes every start."""

    slots = 2

    def __init__(self, folder: SweepFolder, started: list[str]):
        self.folder, self.started = folder, started

    def adopt(self, point):
        return None

    def start(self, point, config, claim, given_up=None):
        self.started.append(point.id)
        return Moment(self.folder.path / point.id, time.monotonic() + 0.02)


class Moment:
    def __init__(self, run: Path, until: float):
        self.run, self.until = run, until

    def poll(self):
        if time.monotonic() < self.until:
            return None
        self.run.mkdir()
        (self.run / "summary.json").write_text(json.dumps({"state": "finished", "valid/nll": 1.0}))
        return PointEnd(0)

    def stop(self): ...

    def kill(self): ...


def test_several_that_work_on_one_sweep_run_each_point_once(toy, monkeypatch):
    monkeypatch.setattr("jaxops.sweep.work.POLL", 0.005)
    monkeypatch.setattr("jaxops.sweep.work.ELSEWHERE", 0.02)
    plan = make_plan("toy.yaml", ["run.seed=0..39"])
    folder, started = SweepFolder(plan.folder), list[str]()
    folder.begin(plan)
    work = lambda: Sweep(plan, folder, Slow(folder, started), lambda line: None).run()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(started) == sorted(point.id for point in plan.points)


def test_a_point_that_nobody_runs_any_more_is_not_said_to_run(toy):
    """optuna/optuna#913: trials of a killed process stay RUNNING for ever."""
    plan = make_plan("lr.yaml")
    folder, (first, second, *_) = SweepFolder(plan.folder), plan.points
    folder.begin(plan)
    claim = folder.claim(first)
    assert folder.claim(first) is None and folder.state(first)[0] == "running" and folder.state(second)[0] == "waiting"
    claim.close()
    assert folder.state(first)[0] == "waiting"
    folder.record(first, PointEnd(1, "a reason"))
    assert folder.state(first) == ("failed", "a reason")
    folder.record(first, PointEnd(75))
    assert folder.state(first) == ("waiting", "")


def test_a_machine_is_shared_out(monkeypatch):
    assert shares(2, range(5), []) == [JobShare(frozenset({0, 1}), ()), JobShare(frozenset({2, 3, 4}), ())]
    assert shares(3, range(2), []) == [JobShare(frozenset({0, 1}), ())] * 3  # more jobs than cores: nothing is assigned
    assert [share.gpus for share in shares(2, range(4), ["0", "2", "5"])] == [("0",), ("2", "5")]
    with pytest.raises(UserError, match=r"4 jobs, but 2 GPU\(s\)"):
        shares(4, range(8), ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-7f")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert gpus_here() == []
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert gpus_here() == ["2", "GPU-7f"]


PROGRAM = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the suite in its background ignores it
import jaxops.cli.sweep as command
stub = "import pathlib, sys, types\\n"
stub += "page = types.SimpleNamespace(write_report=lambda run: pathlib.Path(run) / 'report.html')\\n"
stub += "sys.modules['jaxops.report.page'] = page\\n"
stub += "open('started.txt', 'a').write(pathlib.Path(sys.argv[-1]).stem + chr(10))\\n"
stub += "import time, toy_family\\nbatch = toy_family.Letters.batch\\n"
stub += "toy_family.Letters.batch = lambda *a: (time.sleep(0.1), batch(*a))[1]\\n"
command.CHILD = stub + command.CHILD
from jaxops.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def begun(*arguments: str, **options) -> subprocess.Popen:
    """`jaxops sweep` as a process of its own, whose children note their start and take a moment for each batch."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])}
    command = [sys.executable, "-c", PROGRAM, "sweep", *arguments]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def until(holds, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def finished(folder: str) -> set[str]:
    files = Path(folder).glob("*/summary.json")
    return {file.parent.name for file in files if json.loads(file.read_text())["state"] == "finished"}


def started() -> list[str]:
    return Path("started.txt").read_text().split() if Path("started.txt").exists() else []


def test_points_that_are_refused_alike_end_the_sweep_and_a_mended_base_goes_on(toy, quick_fit, monkeypatch, capsys):
    """Two hundred points would each open the data to say that a column is not there."""

    def refused(task, **options):
        raise UserError("plays.csv: no column 'user'")

    with monkeypatch.context() as patch:
        patch.setattr("jaxops.sweep.runners.fit", refused)
        assert main(["sweep", "lr.yaml", *HERE, "runs.seeds=4"]) == 2
        said = capsys.readouterr().err
    assert said.count(" begins") == 3
    assert "the first 3 points were refused for one reason, and 5 more were not started" in said
    assert not list(Path("runs/lr").glob("*/config.yaml"))
    Path("toy.yaml").write_text(Path("toy.yaml").read_text().replace("global: 16", "global: 32"))  # every id is another
    status, found, _ = swept(capsys, "lr.yaml", *HERE, "runs.seeds=4")
    assert status == 0 and states(found) == ["finished"] * 8
    Path("toy.yaml").write_text(Path("toy.yaml").read_text().replace("global: 32", "global: 16"))
    assert main(["sweep", "lr.yaml", *HERE, "runs.seeds=4"]) == 2
    assert "is the folder of another sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_runs_exactly_what_is_missing(toy):
    arguments = ["toy.yaml", "optimizer.lr=1.0,2.0,4.0", "run.seed=0..3", "runner.jobs=2", "name=twelve"]
    first = begun(*arguments)
    until(lambda: len(finished("runs/twelve")) >= 4)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    folder, plan = SweepFolder(Path("runs/twelve")), read_plan(Path("runs/twelve"))
    until(lambda: not any(folder.is_claimed(point) for point in plan.points))  # its children save, and end
    done, before = finished("runs/twelve"), started()
    whole = {run: Path("runs/twelve", run, "metrics.jsonl").read_bytes() for run in done}
    assert 4 <= len(done) < 12

    out, err = begun(*arguments, "--json").communicate()
    found = json.loads(out)
    assert states(found) == ["finished"] * 12, err
    after = started()[len(before) :]
    assert sorted(after) == sorted({point["id"] for point in found["points"]} - done)
    assert all(Path("runs/twelve", run, "metrics.jsonl").read_bytes() == text for run, text in whole.items())
    for point in found["points"]:  # each step was trained and logged once, by whichever process
        lines = [line["step"] for line in read_metrics(Path(point["dir"], "metrics.jsonl")) if "valid/nll" in line]
        assert lines == [2, 4]
    assert found["winner"] == {"optimizer.lr": 4.0}


@pytest.mark.slow
def test_two_processes_on_one_sweep_never_run_a_point_twice(toy):
    both = [begun("toy.yaml", "run.seed=0..5", "--json") for _ in range(2)]
    told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert len(started()) == 6 and len(set(started())) == 6
    assert all(states(json.loads(out)) == ["finished"] * 6 for out, _ in told)
    assert all(" begins" in err for _, err in told)


@pytest.mark.slow
def test_points_train_in_this_process(toy, capsys):
    status, found, _ = swept(capsys, "lr.yaml", *HERE, "runs.seeds=1")
    assert status == 0 and states(found) == ["finished"] * 2
    summaries = [json.loads(Path(point["dir"], "summary.json").read_text()) for point in found["points"]]
    assert [point["value"] for point in found["points"]] == [summary["valid/nll"] for summary in summaries]
    assert found["points"][1]["value"] < found["points"][0]["value"]
    status, _, said = swept(capsys, "lr.yaml", *HERE, "init_from.run=nowhere", "name=lost", "runs.seeds=1")
    assert status == 1 and "nowhere" in said


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_at_once(toy):
    process = begun("toy.yaml", "run.seed=0..2", "run.steps=400", "name=cut")
    until(lambda: started())  # its child imports jax now, and would take seconds to save
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (75, 130)  # 75: the child was faster
    folder, plan = SweepFolder(Path("runs/cut")), read_plan(Path("runs/cut"))
    assert not any(folder.is_claimed(point) for point in plan.points)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "--stop"])
def test_told_to_stop_in_process_it_saves_too(toy, how):
    Path("slow.py").write_text(
        "import time, toy_family\nbatch = toy_family.Letters.batch\n"
        "toy_family.Letters.batch = lambda *a: (time.sleep(0.1), batch(*a))[1]\n"
        "import sys\nfrom jaxops.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])}
    command = [sys.executable, "slow.py", "sweep", "toy.yaml", "run.seed=0..1", "run.steps=40", "name=cut"]
    process = subprocess.Popen([*command, "runner.kind=in_process"], env=env, text=True, stderr=subprocess.PIPE)
    until(lambda: any('"step": 6' in file.read_text() for file in Path("runs/cut").glob("*/metrics.jsonl")))
    if how == "--stop":
        assert main(["sweep", "runs/cut", "--stop"]) == 0
    else:
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "1 unfinished, 1 waiting; the same command goes on" in err, err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "sigterm", "--stop"])
def test_told_to_stop_it_saves_and_says_what_is_left(toy, how):
    process = begun("toy.yaml", "run.seed=0..2", "run.steps=40", "name=cut")
    until(lambda: any('"step": 6' in file.read_text() for file in Path("runs/cut").glob("*/metrics.jsonl")))
    if how == "--stop":
        assert main(["sweep", "runs/cut", "--stop"]) == 0
    else:
        process.send_signal(signal.SIGINT if how == "ctrl-c" else signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "1 unfinished, 2 waiting; the same command goes on" in err, err
    (run,) = started()
    summary = json.loads(Path("runs/cut", run, "summary.json").read_text())
    assert summary["state"] == "preempted" and summary["step"] >= 6
    process = begun("toy.yaml", "run.seed=0..2", "run.steps=40", "name=cut", "--json")
    _, err = process.communicate()
    assert process.returncode == 0 and f"{run} goes on" in err
    events = [line.get("event") for line in read_metrics(Path("runs/cut", run, "metrics.jsonl"))]
    assert "resumed" in events
