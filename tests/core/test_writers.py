"""Records survive kills, resumes and full disks; what is read back is what was written."""

import json
import math
import os
import struct
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.loggers import TensorBoardWriter, WandbWriter
from jaxops.core.metrics_file import JsonlWriter, SamplesWriter, read_metrics
from jaxops.core.whole_files import replace_file
from jaxops.core.writers import Writer, Writers
from jaxops.report.pictures import pictures


def without_time(lines):
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def write_steps(path, steps, resume_step=None):
    writer = JsonlWriter(path, resume_step=resume_step)
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / step})
    writer.close()


def test_lines_have_the_documented_form(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(np.int64(100), {"train/loss": jnp.float32(0.5), "n": np.float64(3), "count": 4})
    assert len(path.read_text().splitlines()) == 1  # on the disk before close
    writer.event(100, "resumed", 'from step 100 "here"\nand 日本')
    writer.close()
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first.pop("time") == pytest.approx(second.pop("time"), abs=60)
    assert first == {"v": 1, "step": 100, "train/loss": 0.5, "n": 3.0, "count": 4.0}
    assert second == {"v": 1, "step": 100, "event": "resumed", "text": 'from step 100 "here"\nand 日本'}


def test_non_finite_values_are_valid_json_and_come_back_as_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": jnp.float32(jnp.nan), "e": 2.0})
    writer.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert [line[k] for k in "abcd"] == [None] * 4
    (read,) = read_metrics(path)
    assert all(math.isnan(read[k]) for k in "abcd") and read["e"] == 2.0


@pytest.mark.parametrize("torn", [b'{"v": 1, "step": 4, "tra', b'{"v": 1, "step": 4, "x": "\xe6', b"\0\0\0\0", b"{"])
def test_a_line_torn_by_a_kill_is_skipped_and_cut_off(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    writer = JsonlWriter(path)
    assert path.read_bytes() == whole
    writer.write(4, {"x": 1.0})
    writer.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(path, [3])
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    write_steps(tmp_path / "straight", range(1, 11))
    write_steps(tmp_path / "resumed", range(1, 8))
    with open(tmp_path / "resumed", "ab") as file:
        file.write(b'{"v": 1, "step": 8, "tr')
    write_steps(tmp_path / "resumed", range(6, 11), resume_step=5)
    straight, resumed = (read_metrics(tmp_path / name) for name in ("straight", "resumed"))
    assert without_time(straight) == without_time(resumed)
    assert sorted(os.listdir(tmp_path)) == ["resumed", "straight"]


def test_resuming_at_step_zero_starts_anew_and_events_go_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    writer = JsonlWriter(path, resume_step=1)
    writer.event(3, "skipped", "non-finite gradient")
    writer.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 3]
    JsonlWriter(path, resume_step=0).close()
    assert read_metrics(path) == []


def test_a_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        JsonlWriter(path, resume_step=1)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_a_clear_message(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.close()
    with open("/dev/full", "wb", buffering=0) as full:
        writer._file = full
        with pytest.raises(RunFailed, match=r"cannot write to .*metrics.jsonl: No space left on device"):
            writer.write(1, {"a": 1.0})


def test_a_path_that_cannot_be_is_a_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    for make in (
        lambda: JsonlWriter(tmp_path / "file" / "metrics.jsonl"),
        lambda: TensorBoardWriter(tmp_path / "file" / "run"),
    ):
        with pytest.raises(RunFailed, match="cannot write to"):
            make()


def test_names_of_the_format_are_refused(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="time"):
        writer.write(1, {"time": 3.0})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_reading_nothing_strange_lines_and_a_newer_format(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('[1]\n\n"x"\n{"v": 1}\n{"v": 1, "step": 1, "a": null}\n{"step": 2}\n')
    (line,) = read_metrics(path)
    assert line["step"] == 1 and math.isnan(line["a"])
    path.write_text('{"v": 1, "step": 1}\n{"v": 2, "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: format 2"):
        read_metrics(path)


def test_replace_file_leaves_no_scraps(tmp_path):
    replace_file(tmp_path / "a", [b"one", b"two"])
    replace_file(tmp_path / "a", [b"three"])
    assert (tmp_path / "a").read_bytes() == b"three" and os.listdir(tmp_path) == ["a"]


class Recorder:
    def __init__(self, fails=False):
        self.calls, self.fails = [], fails

    def write(self, step, values):
        self.calls.append((step, dict(values)))

    def close(self):
        self.calls.append("closed")
        if self.fails:
            raise RunFailed("lost")


class WriteOnly:
    """One's own writer: the protocol has one method."""

    def __init__(self):
        self.steps = []

    def write(self, step, values):
        self.steps.append(step)


def test_several_writers_as_one(tmp_path):
    own, first, second = WriteOnly(), Recorder(fails=True), Recorder()
    jsonl = JsonlWriter(tmp_path / "metrics.jsonl")
    assert all(isinstance(w, Writer) for w in (own, first, jsonl)) and not isinstance(object(), Writer)
    writers = Writers([own, first, jsonl, second])
    writers.write(1, {"a": 1.0})
    writers.event(1, "resumed", "")
    with pytest.raises(RunFailed, match="lost"):
        writers.close()
    assert own.steps == [1] and second.calls == [(1, {"a": 1.0}), "closed"]
    assert [line.get("event") for line in read_metrics(jsonl.path)] == [None, "resumed"]


def tensorboard_events(folder):
    """Every event of every file in name order: TFRecord frames, length 8, crc 4, data, crc 4."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_tensorboard_events_and_their_purge_on_resume(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0 / step, "valid/ndcg@10": math.nan})
    writer.close()
    resumed = TensorBoardWriter(tmp_path, resume_step=2)
    resumed.write(3, {"train/loss": jnp.float32(7.0)})
    resumed.close()
    assert len(list(tmp_path.iterdir())) == 2
    shown = {}
    for event in tensorboard_events(tmp_path):
        if event.session_log.status == SessionLog.START:
            shown = {step: v for step, v in shown.items() if step < event.step}
        for value in event.summary.value:
            shown.setdefault(event.step, {})[value.tag] = value.simple_value
    assert sorted(shown) == [1, 2, 3] and shown[3] == {"train/loss": 7.0}
    assert shown[2]["train/loss"] == 0.5 and math.isnan(shown[2]["valid/ndcg@10"])


def test_tensorboard_files_are_in_order_where_a_clock_was_set_back(tmp_path, monkeypatch):
    """TensorBoard reads them by name: what a resume hides must come before it."""
    for now, start in ((2e9, None), (1.9e9, 2), (1.8e9, 3)):
        monkeypatch.setattr("jaxops.core.loggers.time.time", lambda now=now: now)
        writer = TensorBoardWriter(tmp_path, resume_step=start)
        for step in range((start or 0) + 1, 5):
            writer.write(step, {"a": step + now})
        writer.close()
    starts = [event.step for event in tensorboard_events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [3, 4] and len(list(tmp_path.iterdir())) == 3


def test_what_a_kill_lost_of_the_last_step_is_replayed(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(4, {"train/loss": 1.0})
    writer.write(5, {"train/loss": 2.0})  # and valid/hr, which was not flushed
    writer.close()
    lines = [{"v": 1, "step": 5, "time": 7.5, "train/loss": 2.0}, {"v": 1, "step": 5, "time": 8.0, "valid/hr": 0.5}]
    TensorBoardWriter(tmp_path, resume_step=5, replay=lines).close()
    shown = []
    for event in tensorboard_events(tmp_path):
        if event.session_log.status == SessionLog.START:
            shown = [point for point in shown if point[1] < event.step]
        shown += [(value.tag, event.step, value.simple_value, event.wall_time) for value in event.summary.value]
    assert shown[1:] == [("train/loss", 5, 2.0, 7.5), ("valid/hr", 5, 0.5, 8.0)]


def test_tensorboard_flushes_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(TensorBoardWriter, "FLUSH_SECONDS", -1.0)
    writer = TensorBoardWriter(tmp_path)
    writer.write(5, {"a": 1.0})
    assert [event.step for event in tensorboard_events(tmp_path)][-1] == 5
    writer.close()


SAMPLES = [
    {"part": "valid", "prompt": "a | b", "completion": "<b>one</b>\n`two`"},
    {"part": "valid", "prompt": "c", "completion": "", "rewards": [1, 2]},
    {"part": "test", "prompt": "d", "completion": "e"},
]


def test_tensorboard_shows_samples_as_written_and_again_after_a_kill(tmp_path):
    def texts():
        shown = []
        for event in tensorboard_events(tmp_path):
            if event.session_log.status == SessionLog.START:
                shown = [one for one in shown if one[1] < event.step]
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "text":
                    shown.append((value.tag, event.step, value.tensor.string_val[0].decode()))
        return shown

    writer = TensorBoardWriter(tmp_path)
    Writers([writer]).samples(5, SAMPLES)
    writer.close()
    before = texts()
    assert [tag.removesuffix("/text_summary") for tag, _, _ in before] == [
        "samples/valid/0",
        "samples/valid/1",
        "samples/test/0",
    ]
    assert before[0][2] == "**prompt**\n\n    a | b\n\n**completion**\n\n    <b>one</b>\n    `two`"
    assert before[1][2].endswith("**rewards**\n\n    [1, 2]")
    lines = [{"v": 1, "step": 5, "time": 7.5, **sample} for sample in SAMPLES]
    TensorBoardWriter(tmp_path, resume_step=5, replay=[], replay_samples=lines).close()
    replayed = texts()
    assert [one[1:] for one in replayed] == [one[1:] for one in before]


def test_tensorboard_takes_a_picture(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    png = next(png for _, png in pictures({"test/reliability": [[0.1, 0.6], [0.2, 0.5], [0.5, 0.5]]}))
    assert Writers([writer]).take_pictures and not Writers([SamplesWriter(tmp_path / "samples.jsonl")]).take_pictures
    Writers([writer]).picture(9, "test/reliability", png)
    writer.close()
    event = list(tensorboard_events(tmp_path))[-1]
    (value,) = event.summary.value
    assert (event.step, value.tag, value.image.encoded_image_string) == (9, "test/reliability", png)
    assert (value.image.width, value.image.height) == (576, 432)


@pytest.fixture
def fake_wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.inits, module.logs, module.finished = [], [], 0

    class Run:
        def log(self, values, step):
            module.logs.append((step, values))

        def finish(self):
            module.finished += 1

    def init(**arguments):
        module.inits.append(arguments)
        return Run()

    module.init = init
    module.Table = lambda **table: ("table", table)
    module.Image = lambda path: ("image", Path(path).read_bytes())
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_continues_the_same_run(tmp_path, fake_wandb):
    run_dir = tmp_path / "my-run"
    for step in (1, 2):
        writer = WandbWriter(run_dir, project="home-row", config={"seed": 1})
        writer.write(step, {"loss": jnp.float32(0.5)})
        writer.close()
    first, second = fake_wandb.inits
    assert first["id"] == second["id"] == json.loads((run_dir / "wandb.json").read_text())["id"]
    assert first["resume"] == "allow" and first["project"] == "home-row" and first["name"] == "my-run"
    assert first["dir"] == str(run_dir) and first["config"] == {"seed": 1}
    assert fake_wandb.logs == [(1, {"loss": 0.5}), (2, {"loss": 0.5})] and fake_wandb.finished == 2
    WandbWriter(tmp_path / "other")
    assert fake_wandb.inits[2]["id"] != first["id"]


def test_wandb_gets_samples_as_a_table_and_pictures(tmp_path, fake_wandb):
    writer = WandbWriter(tmp_path)
    Writers([writer]).samples(5, SAMPLES)
    Writers([writer]).picture(6, "test/reliability", b"\x89PNG...")
    (_, valid), (_, test), (step, picture) = fake_wandb.logs
    kind, table = valid["samples/valid"]
    assert kind == "table" and table["columns"] == ["prompt", "completion", "rewards"]
    assert table["data"] == [["a | b", "<b>one</b>\n`two`", None], ["c", "", "[1, 2]"]]
    assert list(test) == ["samples/test"]
    assert step == 6 and picture == {"test/reliability": ("image", b"\x89PNG...")}


def test_wandb_id_file_broken_by_a_kill_gives_a_new_run(tmp_path, fake_wandb):
    (tmp_path / "wandb.json").write_text('{"version": 1, "i')
    WandbWriter(tmp_path)
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == fake_wandb.inits[0]["id"]


def test_wandb_missing_names_the_extra_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'jaxops\[wandb\]'"):
        WandbWriter(tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_wandb_that_will_not_start_says_what_to_do(tmp_path, fake_wandb):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    fake_wandb.init = init
    with pytest.raises(UserError, match=r"api_key not configured.*WANDB_MODE=offline"):
        WandbWriter(tmp_path)
