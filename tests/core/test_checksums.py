"""Checksums taken while files are being written: the same as those taken afterwards, or none."""

import os
import pathlib
import threading
import time
import zlib

import numpy as np
import pytest
from etils import epath

from jaxops.core import manifest
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.checksums import Early, of_file, side_by_side

BIG = bytes(range(256)) * 8192  # 2 MiB


@pytest.fixture
def looking(tmp_path):
    """An Early over one folder, and a function that returns when it has looked at everything a few times."""
    looks = threading.Semaphore(0)

    def find():
        looks.release()
        return [tmp_path]

    def look_again():
        while looks.acquire(blocking=False):
            pass
        for _ in range(5):
            assert looks.acquire(timeout=30)

    early = Early(find, quiet=0.02)
    return early, look_again


def test_what_was_read_early_is_known_wherever_it_was_moved(tmp_path, looking):
    early, look_again = looking
    (tmp_path / "a").write_bytes(BIG)
    (tmp_path / "small").write_bytes(b"x")
    with early:
        look_again()
    os.replace(tmp_path / "a", tmp_path / "b")
    assert early.known(tmp_path / "b") == of_file(tmp_path / "b") == zlib.crc32(BIG)
    assert early.known(tmp_path / "small") is None


@pytest.mark.parametrize("change", ["append", "overwrite", "replace"])
def test_what_was_changed_since_is_not_known(tmp_path, looking, change):
    early, look_again = looking
    path = tmp_path / "a"
    path.write_bytes(BIG)
    with early:
        look_again()
        assert early.known(path) == zlib.crc32(BIG)
        time.sleep(0.02)  # more than a tick of the file system's clock, as `quiet` is
        if change == "replace":
            (tmp_path / "new").write_bytes(BIG[::-1])
            os.replace(tmp_path / "new", path)
            assert early.known(path) in (None, zlib.crc32(BIG[::-1]))
        else:
            with open(path, "ab" if change == "append" else "r+b") as file:
                file.write(b"y")
                file.flush()
                assert early.known(path) != zlib.crc32(BIG)
        look_again()
    assert early.known(path) == of_file(path) != zlib.crc32(BIG)


def test_a_file_that_keeps_changing_is_left_for_the_end(tmp_path, looking):
    early, look_again = looking
    stop = threading.Event()

    def write():
        with open(tmp_path / "a", "wb") as file:
            while not stop.is_set():
                file.write(BIG)
                file.flush()
                file.seek(0)

    writer = threading.Thread(target=write)
    with early:
        writer.start()
        look_again()
        stop.set()
        writer.join()
    assert early.known(tmp_path / "a") in (None, zlib.crc32(BIG))


def test_a_folder_that_is_not_there_or_goes_away(tmp_path):
    with Early(lambda: [tmp_path / "none"], quiet=0.001) as early:
        time.sleep(0.02)
    with pytest.raises(FileNotFoundError):
        early.known(tmp_path / "none")

    def gone():
        raise OSError("gone")

    with Early(gone, quiet=0.001):
        time.sleep(0.02)


def test_side_by_side_keeps_the_order_and_raises():
    assert side_by_side(lambda x: x * 2, range(20)) == [2 * x for x in range(20)]
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda x: 1 // x, [1, 0])


def test_a_survey_takes_only_what_still_holds(tmp_path, looking):
    early, look_again = looking
    for name in "ab":
        (tmp_path / name).write_bytes(BIG)
    with early:
        look_again()
    time.sleep(0.02)
    with open(tmp_path / "b", "r+b") as file:
        file.write(b"y")
    assert early.known(tmp_path / "a") is not None and early.known(tmp_path / "b") is None
    folder = epath.Path(tmp_path)
    found = manifest.survey(folder, checksums=True, early=early)
    assert found == manifest.survey(folder, checksums=True)


def test_what_a_save_notes_is_what_lies_there(tmp_path, monkeypatch):
    """Whatever of it was known early is right; how much that is depends on the disk."""
    known = []
    survey = manifest.survey

    def spy(folder, *, checksums, early=None):
        if early is not None:
            known.extend(early.known(path) for path in pathlib.Path(folder).rglob("*") if path.is_file())
        return survey(folder, checksums=checksums, early=early)

    monkeypatch.setattr(manifest, "survey", spy)
    rng = np.random.default_rng(0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {f"w{i}": rng.random((4096, 1024), np.float32) for i in range(16)}, {})
        assert checkpoints.verify(1) == []
    assert known and all(crc is None or isinstance(crc, int) for crc in known)
