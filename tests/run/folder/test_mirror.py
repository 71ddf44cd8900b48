"""Logs in parts, the mirror of a run folder and its lease, over a store in memory that can be made to fail."""

import itertools
import json
import random
import struct
import threading
import time
from pathlib import Path

import pytest

obstore = pytest.importorskip("obstore")

from jaxops.core import stores  # noqa: E402
from jaxops.core.failures import RunFailed, UserError  # noqa: E402
from jaxops.core.loggers import TensorBoardWriter  # noqa: E402
from jaxops.core.metrics_file import JsonlWriter, read_metrics  # noqa: E402
from jaxops.core.stores import Denied, Store, StoreError, Unconditional  # noqa: E402
from jaxops.run.folder import lease, log_parts, mirror  # noqa: E402
from jaxops.run.folder.lease import Lease  # noqa: E402
from jaxops.run.folder.log_parts import LogParts, parts_of, pieces  # noqa: E402
from jaxops.run.folder.mirror import Mirror  # noqa: E402

URL = "s3://bucket/runs/one"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """The store of every location, and quick threads."""
    memory = Store("s3", "bucket", obstore.store.MemoryStore())
    monkeypatch.setattr(stores, "open_store", lambda place, patient=True: memory)
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirror, "EVERY", 0.02)
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "LAPSE", 0.2)
    return memory


def kept(store: Store, folder: str = "runs/one") -> dict[str, bytes]:
    """Name -> contents of all below a folder of the store."""
    return {entry.key[len(folder) + 1 :]: store.read(entry.key) for entry in store.entries(folder)}


def joined(objects: dict[str, bytes], log: str = "metrics.jsonl") -> bytes:
    return b"".join(objects[name] for name in parts_of(objects).get(log, ()))


# Logs in parts


class Parts(dict):
    """A store of one log's parts; raises at the `fail`th change."""

    fail = -1

    def _change(self) -> None:
        self.fail -= 1
        if self.fail == -1:
            raise StoreError("gone")

    def put(self, number: int, data: bytes) -> None:
        self._change()
        self[number] = data

    def drop(self, number: int) -> None:
        self._change()
        del self[number]

    @property
    def joined(self) -> bytes:
        assert sorted(self) == list(range(len(self)))
        return b"".join(self[number] for number in sorted(self))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_parts, "PART_BYTES", 40)


def test_parts_grow_with_the_log_and_end_in_whole_lines(small, tmp_path):
    file, there = tmp_path / "metrics.jsonl", Parts()
    log, written = LogParts(file, there.put, there.drop), b""
    for number in range(60):
        line = b'{"step": %d}\n' % number
        with open(file, "ab") as out:
            out.write(line + b'{"torn')
        log.push()
        written += line
        assert there.joined == written
        file.write_bytes(written)  # in place: the same file, as a writer that goes on
    assert len(there) > 10 and all(part.endswith(b"\n") for part in there.values())
    log.push()
    assert not log.push()


def test_a_full_part_is_never_written_again(small, tmp_path):
    file, there, written = tmp_path / "metrics.jsonl", Parts(), []
    log = LogParts(file, lambda number, data: (written.append(number), there.put(number, data)), there.drop)
    for number in range(40):
        with open(file, "ab") as out:
            out.write(b'{"step": %d, "loss": 1.25}\n' % number)
        log.push()
    assert written == sorted(written) and max(map(written.count, written)) <= 3


def test_lines_that_a_resume_drops_go_in_an_order_that_never_lies(small, tmp_path):
    """Killed at any change of the store, what the parts join to is the beginning of the old log or of the new."""
    draw = random.Random(5)
    for _ in range(40):
        lines = [
            b'{"step": %d, "x": %d}\n' % (number, draw.randrange(10**9)) for number in range(draw.randrange(2, 40))
        ]
        keep = draw.randrange(len(lines))
        grown = [b'{"step": %d, "y": %d}\n' % (keep + n, draw.randrange(10**9)) for n in range(draw.randrange(0, 20))]
        old, new = b"".join(lines), b"".join(lines[:keep] + grown)
        for fail in itertools.count():
            file, there = tmp_path / "metrics.jsonl", Parts()
            file.write_bytes(old)
            log = LogParts(file, there.put, there.drop)
            log.push()
            file.unlink()
            (tmp_path / "other").write_bytes(new)  # another inode, as after a replacement
            (tmp_path / "other").rename(file)
            there.fail = fail
            try:
                log.push()
            except StoreError:
                assert old.startswith(there.joined) or new.startswith(there.joined)
                log.push()  # as the thread does
            else:
                assert there.joined == new
                break
            assert there.joined == new


def test_every_part_of_a_tensorboard_log_is_one(small, tmp_path):
    writer = TensorBoardWriter(tmp_path)
    for step in range(20):
        writer.write(step, {"loss": 1.0})
    writer.close()
    (file,) = tmp_path.glob("*tfevents*")
    whole = file.read_bytes()
    parts = pieces(file.name, whole)
    assert len(parts) > 5 and b"".join(parts) == whole
    assert b"".join(pieces(file.name, whole[:-1])) == whole[: -16 - struct.unpack("<Q", last_record(whole)[:8])[0]]
    for part in parts:
        end = 0
        while end < len(part):
            end += 16 + struct.unpack_from("<Q", part, end)[0]
        assert end == len(part)


def last_record(data: bytes) -> bytes:
    at = end = 0
    while end < len(data):
        at, end = end, end + 16 + struct.unpack_from("<Q", data, end)[0]
    return data[at:]


def test_only_numbered_parts_without_a_gap_are_a_log():
    names = ["metrics.jsonl.000001", "metrics.jsonl.000000", "metrics.jsonl.000003", "other.000000", "metrics.jsonl"]
    assert parts_of(names) == {"metrics.jsonl": ["metrics.jsonl.000000", "metrics.jsonl.000001"]}


# The mirror


def test_what_a_run_writes_is_there_when_it_is_over(store):
    run = Mirror(URL)
    run.pull()
    with run.held(print):
        assert lease.NAME in kept(store)
        (run.local / "transform").mkdir()
        (run.local / "transform" / "ids.parquet").write_bytes(b"ids")
        (run.local / "config.yaml").write_text("a: 1")
        writer = JsonlWriter(run.local / "metrics.jsonl")
        writer.write(1, {"loss": 2.0})
        run.push()
        assert kept(store)["config.yaml"] == b"a: 1"
        writer.write(2, {"loss": 1.0})
        writer.close()
        (run.local / ".scratch").write_text("not of the run")
        (run.local / "summary.json").write_text("{}")
    objects = kept(store)
    assert set(objects) == {"transform/ids.parquet", "config.yaml", "metrics.jsonl.000000", "summary.json"}
    assert joined(objects) == (run.local / "metrics.jsonl").read_bytes()


def test_the_summary_is_the_last_to_come(store, monkeypatch):
    sent: list[str] = []
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda self, key, *a, **k: (sent.append(key), write(self, key, *a, **k))[1])
    run = Mirror(URL)
    run.pull()
    monkeypatch.setattr(mirror, "EVERY", 60.0)
    with run.held(print):
        for name in ("summary.json", "config.yaml", "data.json", "report.html", "metrics.jsonl"):
            (run.local / name).write_text("{}\n")
    names = [key.rpartition("/")[2] for key in sent if lease.NAME not in key]
    assert names == ["data.json", "metrics.jsonl.000000", "config.yaml", "report.html", "summary.json"]


def test_another_machine_goes_on_with_the_log_as_the_resume_left_it(store, monkeypatch, tmp_path, small):
    def train(first: int, last: int, resume: int) -> bytes:
        run = Mirror(URL)
        run.pull()
        with run.held(print):
            writer = JsonlWriter(run.local / "metrics.jsonl", resume_step=resume)
            for step in range(first, last):
                writer.write(step, {"loss": float(step)})
            writer.close()
        return (run.local / "metrics.jsonl").read_bytes()

    train(1, 21, 0)
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "another"))
    local = train(11, 15, 10)
    assert joined(kept(store)) == local
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "third"))
    reader = Mirror(URL)
    reader.pull()
    assert [line["step"] for line in read_metrics(reader.local / "metrics.jsonl")] == list(range(1, 15))


def test_a_reader_gets_what_changed_and_forgets_what_is_gone(store, monkeypatch):
    store.write("runs/one/config.yaml", b"a: 1")
    store.write("runs/one/summary.json", b"{}")
    store.write("runs/one/report.html", b"<html>")
    store.write("runs/one/checkpoints/10/jaxops.json", b"{}")
    reader = Mirror(URL)
    reader.pull()
    assert reader.names == {"config.yaml", "summary.json", "report.html", "checkpoints"}
    files = {path.name for path in reader.local.iterdir() if not path.name.startswith(".")}
    assert files == {"config.yaml", "summary.json"}
    read: list[str] = []
    plain = Store.read
    monkeypatch.setattr(Store, "read", lambda self, key: (read.append(key), plain(self, key))[1])
    store.delete(["runs/one/summary.json"])
    store.write("runs/one/config.yaml", b"a: 2")
    Mirror(URL).pull()
    Mirror(URL).pull()
    assert read == ["runs/one/config.yaml"]
    assert (reader.local / "config.yaml").read_text() == "a: 2" and not (reader.local / "summary.json").exists()


def test_a_reader_leaves_the_run_alone_that_is_training_here(store):
    from jaxops.run.folder.run_folder import RunFolder

    place = RunFolder(URL)
    with place.locked(print):
        (place.path / "metrics.jsonl").write_text('{"v": 1, "step": 1}\n')
        Mirror(URL).pull()
        assert (place.path / "metrics.jsonl").exists()


def test_a_store_that_is_away_for_a_while_costs_nothing(store, monkeypatch):
    write, failures = Store.write, iter([StoreError("503")] * 3)

    def flaky(self, key, *args, **options):
        if lease.NAME not in key and (error := next(failures, None)):
            raise error
        return write(self, key, *args, **options)

    run = Mirror(URL)
    run.pull()
    monkeypatch.setattr(Store, "write", flaky)
    with run.held(print):
        (run.local / "config.yaml").write_text("a: 1")
        wait_for(lambda: "config.yaml" in kept(store))
        run.poll()


@pytest.mark.parametrize("error", [Denied("AccessDenied"), StoreError("503")])
def test_a_store_that_stays_away_fails_the_run(store, monkeypatch, error):
    monkeypatch.setattr(mirror, "GIVE_UP", 0.05)
    write = Store.write

    def refuse(self, key, *args, **options):
        if lease.NAME not in key:
            raise error
        return write(self, key, *args, **options)

    def failed() -> bool:
        try:
            run.poll()
        except RunFailed as failure:
            assert f"the records of {URL} could not be brought there: {error}" in str(failure)
            return True
        return False

    run = Mirror(URL)
    run.pull()
    monkeypatch.setattr(Store, "write", refuse)
    with pytest.raises(RunFailed, match=f"the records of {URL} could not be brought there: {error}"), run.held(print):
        (run.local / "config.yaml").write_text("a: 1")
        wait_for(failed)
    assert kept(store) == {}  # and it let go


def test_an_error_of_the_run_stays_the_one_raised(store, monkeypatch):
    run = Mirror(URL)
    run.pull()
    with pytest.raises(ZeroDivisionError) as caught, run.held(print):
        (run.local / "config.yaml").write_text("a: 1")
        monkeypatch.setattr(Mirror, "push", lambda self, last=False: (_ for _ in ()).throw(Denied("no")))
        1 / 0  # noqa: B018
    assert "could not be brought there: no" in caught.value.__notes__[0]


def test_other_processes_bring_their_signs_alone(store):
    run = Mirror(URL)
    run.local.mkdir(parents=True)
    with run.beside():
        (run.local / "processes").mkdir()
        (run.local / "processes" / "1.json").write_text("{}")
        (run.local / "config.yaml").write_text("a: 1")
        wait_for(lambda: kept(store))
        (run.local / "processes" / "1.stacks.txt").write_text("where it hangs")
    assert set(kept(store)) == {"processes/1.json", "processes/1.stacks.txt"}


def test_who_leaves_at_once_leaves_the_run_to_others(store, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY", 60.0)
    run = Mirror(URL)
    run.pull()
    with run.held(print):
        (run.local / "summary.json").write_text("{}")
        run.leave(10.0)
        assert set(kept(store)) == {"summary.json"}


# The lease


def wait_for(what) -> None:
    for _ in range(500):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def test_one_that_lives_keeps_the_run(store, monkeypatch):
    first, second = Lease(store, "runs/one", URL), Lease(store, "runs/one", URL)
    first.hold(print)
    said: list[str] = []
    with pytest.raises(UserError, match=rf"run {URL} is being trained by another process \(.*, pid \d+\)"):
        second.hold(said.append)
    assert len(said) == 1 and "waiting up to" in said[0]
    first.lost()
    first.release()
    assert kept(store) == {}
    second.hold(said.append)
    second.release()


def test_one_that_is_silent_loses_the_run(store, monkeypatch):
    first, second = Lease(store, "runs/one", URL), Lease(store, "runs/one", URL)
    beat = threading.Event()
    monkeypatch.setattr(Lease, "_beat", lambda self: beat.wait(5) and BEAT(self))

    first.hold(print)
    said: list[str] = []
    second.hold(said.append)
    assert "which was silent" in said[-1]
    beat.set()  # as after a SIGCONT
    wait_for(lambda: first._lost)
    with pytest.raises(RunFailed, match=f"run {URL} was taken over by"):
        first.lost()
    first.release()
    assert json.loads(kept(store)[lease.NAME])["id"] == second._id  # not taken from its new owner
    second.release()


BEAT = Lease._beat


def test_one_whose_process_died_here_is_replaced_at_once(store, monkeypatch):
    monkeypatch.setattr(lease, "LAPSE", 1e6)
    import subprocess
    import sys

    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = {"id": "x", "machine": lease._machine(), "host": "here", "pid": int(gone.stdout), "time": time.time()}
    store.write(f"runs/one/{lease.NAME}", json.dumps(dead).encode())
    assert not lease.is_fresh(json.dumps(dead))
    said: list[str] = []
    ours = Lease(store, "runs/one", URL)
    ours.hold(said.append)
    ours.release()
    assert said == [f"{URL} taken over from here, pid {int(gone.stdout)}, which is gone"]


def test_two_at_once_are_one(store):
    leases = [Lease(store, "runs/one", URL) for _ in range(6)]
    won, lost = [], []

    def hold(one: Lease) -> None:
        try:
            one.hold(lambda text: None)
            won.append(one)
        except UserError:
            lost.append(one)

    threads = [threading.Thread(target=hold, args=(one,)) for one in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 5
    won[0].release()


def test_a_store_without_conditional_writes(store, monkeypatch):
    write = Store.write

    def plain(self, key, data, *, only_if=None):
        if only_if is not None:
            raise Unconditional("501 Not Implemented")
        return write(self, key, data)

    monkeypatch.setattr(Store, "write", plain)
    first, second = Lease(store, "runs/one", URL), Lease(store, "runs/one", URL)
    first.hold(print)
    with pytest.raises(UserError, match="is being trained"):
        second.hold(print)
    first.release()
    assert kept(store) == {}


def test_an_answer_that_was_lost_loses_no_run(store, monkeypatch):
    """The write went through, its answer did not: the next finds its own object where it expects an older one."""
    one = Lease(store, "runs/one", URL)
    one.hold(print)
    store.write(f"runs/one/{lease.NAME}", json.dumps({"id": one._id, "time": 0}).encode())
    wait_for(lambda: json.loads(kept(store)[lease.NAME])["time"] > 0)
    one.lost()
    one.release()
