"""Alarms warn, pause or stop a run, and a resumed run says what one that never stopped says."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
from run_records import records
from test_toy_family import CONFIG

from jaxops.core.alarms import Alarm
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.metrics_file import read_metrics
from jaxops.run.build import build_task, load_config
from jaxops.run.fit import fit

pytestmark = pytest.mark.usefixtures("no_report")
TRAIN, VALID = "train/loss", "valid/nll"


@dataclasses.dataclass(frozen=True)
class Below:
    """An alarm where a metric has fallen below a bound, by a memory of how many metrics it saw before."""

    on_alarm: str
    bound: float = 1.2
    metric: str = TRAIN

    @property
    def rules(self):
        return {f"below={self.bound:g}"}

    def seen(self, memory, step, values):
        seen, x = memory.get("seen", 0), values.get(self.metric, 9.0)
        text = f"{self.metric} fell below {self.bound:g} after {seen} looks"
        return {"seen": seen + 1}, [Alarm(*self.rules, step, self.metric, x, self.bound, text)] * (x < self.bound)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).parents[1] / "toy_family.py", tmp_path)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("toy_family", None)


def train(name, alarms, *overrides, evaluated=True):
    task = build_task(load_config("toy.yaml", [f"run.name={name}", *overrides]))
    return fit(dataclasses.replace(task, alarms=alarms), quiet=True)


def events(name, *kinds):
    lines = read_metrics(f"runs/{name}/metrics.jsonl")
    return [(line["step"], line["event"], line["text"]) for line in lines if line.get("event") in kinds]


def test_a_warning_is_said_once_and_the_run_goes_on(toy, capsys):
    run = train("warned", Below("warn"))
    assert run.state == "finished" and run.summary["step"] == 12 and run.summary["reason"] == "finished"
    ((step, _, text),) = events("warned", "alarm")
    value = next(line[TRAIN] for line in records("runs/warned") if line["step"] == step and TRAIN in line)
    assert value < 1.2 and text.startswith("train/loss fell below 1.2") and text.endswith("(below=1.2)")
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("fell below 1.2") == 1
    (raised,) = run.summary["alarms"]
    assert (raised["step"], raised["value"], raised["action"]) == (step, pytest.approx(value), "warn")
    plain = train("plain", None)
    assert "alarms" not in plain.summary and records("runs/plain") == records("runs/warned")


@pytest.mark.parametrize("metric", [TRAIN, VALID])
def test_a_stop_ends_the_run_as_early_stopping_does(toy, metric):
    rules = Below("stop", metric=metric)
    run = train("stopped", rules)
    step = run.summary["step"]
    assert run.state == "finished" and 2 <= step < 12 and run.summary["reason"].startswith(f"{metric} fell below")
    assert "test/nll" in run.summary and [kind for _, kind, _ in events("stopped", "stopped")] == ["stopped"]
    with Checkpoints("runs/stopped/checkpoints") as checkpoints:
        assert checkpoints.latest() == step
    before = Path("runs/stopped/metrics.jsonl").read_bytes()
    assert train("stopped", rules).summary["step"] == step  # the same again has nothing to do
    assert Path("runs/stopped/metrics.jsonl").read_bytes() == before
    went_on = train("stopped", dataclasses.replace(rules, bound=0.01))
    assert went_on.summary["step"] == 12 and went_on.summary["reason"] == "finished"


@pytest.mark.parametrize("metric", [TRAIN, VALID])
def test_a_pause_saves_and_the_same_command_goes_on(toy, metric):
    rules = Below("pause", metric=metric)
    run = train("paused", rules)
    assert run.state == "paused" and run.summary["step"] < 12 and "test/nll" not in run.summary
    assert run.summary["reason"].startswith(f"{metric} fell below")
    with Checkpoints("runs/paused/checkpoints") as checkpoints:
        assert checkpoints.latest() == run.summary["step"]
    resumed = train("paused", rules)
    assert resumed.state == "finished" and resumed.summary["step"] == 12
    train("whole", dataclasses.replace(rules, on_alarm="warn"))
    assert records("runs/paused") == records("runs/whole")
    # Their texts count what the rules saw before: each window and evaluation once, also where a run was resumed.
    assert events("paused", "alarm") == events("whole", "alarm") and len(events("paused", "alarm")) == 1


def test_an_alarm_in_the_last_evaluation_does_not_pause_for_ever(toy):
    short = ["run.steps=3", "evaluate.every=50"]
    rules = Below("pause", bound=9.0, metric=VALID)
    run = train("last", rules, *short)
    assert run.state == "paused" and run.summary["step"] == 3
    again = train("last", rules, *short)
    assert again.state == "finished" and "test/nll" in again.summary
