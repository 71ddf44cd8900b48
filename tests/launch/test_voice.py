"""What a launcher says, for people and for machines."""

import json

import pytest
from fake_worker import Scene

from jaxops.cli.main import main
from jaxops.launch.voice import VOICE


@pytest.fixture(autouse=True)
def quiet_again():
    yield
    VOICE.json, VOICE.launch = False, ""


def test_people_get_lines_and_machines_one_object_a_line(capsys):
    VOICE.say("attempt 1: started")
    VOICE.worker(1, "tpu1", "step 5")
    said = capsys.readouterr()
    assert (said.err, said.out) == ("launch: attempt 1: started\n", "[1] step 5\n")
    VOICE.json, VOICE.launch = True, "tiny-1"
    VOICE.say("attempt 1: started")
    VOICE.say("the terminal is gone")
    VOICE.worker(1, "tpu1", 'a "quoted" line')
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert said.err == "" and all(line.pop("time") > 1.7e9 for line in lines)
    assert lines == [
        {"launch": "tiny-1", "event": "attempt", "worker": None, "host": None, "text": "attempt 1: started"},
        {"launch": "tiny-1", "event": "note", "worker": None, "host": None, "text": "the terminal is gone"},
        {"launch": "tiny-1", "event": "output", "worker": 1, "host": "tpu1", "text": 'a "quoted" line'},
    ]


def test_workers_of_a_launch_are_heard_with_their_number_and_host(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    VOICE.json = True
    assert Scene(tmp_path).make().launch()[1] == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for worker in (0, 1):
        mine = [line for line in lines if line["worker"] == worker]
        assert [line["text"] for line in mine] == ["from step 0", "done"]
        assert {(line["event"], line["host"]) for line in mine} == {("output", f"local-{worker}")}


def test_an_error_is_an_object_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "my.yaml", "--on", "cpu-4", "--max-hours", "0", "--log", "json"]) == 2
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["event"] == "error" and "--max-hours 0: expected" in line["text"]
