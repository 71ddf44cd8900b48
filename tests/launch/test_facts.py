"""What a launch tells the run about itself: enough for the hours and the bill, and no secret."""

import dataclasses
import json

from fake_worker import Scene

from jaxops.launch.backends.table import find_backend
from jaxops.launch.facts import launch_facts
from jaxops.launch.worker_files import worker_json
from jaxops.report.attempts import attempt_rows


def test_chips_price_digests_and_labels_are_told(tmp_path):
    scene = Scene(tmp_path)
    options = {"image": "reg/img@sha256:abc", "queue": "research", "mount": "a:/b"}
    made = scene.record(backend="gke", type="2xv5p-128", options=options, price="spot", secrets=("TOKEN=k8s:a/b",))
    made = dataclasses.replace(made, code="f" * 64)
    facts = launch_facts(made)
    assert facts == {
        "chips": 128,
        "accelerator": "2xv5p-128",
        "backend": "gke",
        "price": "spot",
        "code": "f" * 64,
        "image": "reg/img",
        "image_digest": "sha256:abc",
        "launch": made.spec.id,
        "hosts": 2,
        "labels": {"queue": "research"},
    }
    rows = dict(attempt_rows({"attempts": [{**facts, "attempt": 1, "began": 0, "seen": 1800}]}))
    assert rows["Launched"] == "1 attempt, 0 preemptions, 64.00 chip-hours on 2xv5p-128, gke, spot"
    assert rows["Launch: image digest"] == "sha256:abc"


def test_cpus_have_no_chip_hours_and_workers_get_the_same_facts(tmp_path):
    scene = Scene(tmp_path).make()
    record = scene.record(backend="slurm", price="")
    assert "chips" not in launch_facts(record) and "price" not in launch_facts(record)
    told = worker_json(record, scene.code(), find_backend("slurm"))
    assert told["facts"] == launch_facts(record) and json.dumps(told)


def test_the_worker_of_a_driven_launch_has_them_in_its_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    scene = Scene(tmp_path).make()
    text = scene.python.read_text()
    line = (
        'open(os.path.join(place, "told-" + os.environ["JAXOPS_PROCESS_ID"]), "w").write(os.environ["JAXOPS_ATTEMPT"])'
    )
    scene.python.write_text(text.replace("alone = open", f"{line}\nalone = open"))
    assert scene.launch()[1] == 0
    told = json.loads((scene.runs / "told-1").read_text())
    assert (told["attempt"], told["backend"], told["hosts"]) == (1, "local", 2) and len(told["code"]) == 64
