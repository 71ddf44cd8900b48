"""The journal keeps answers exactly, over kills and other numbers of processes; its neighbour runs real ones."""

import json
import math
import os
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from object_stores import needs_moto, s3  # noqa: F401 (fixture)

from jaxops.core.answers import Key, digest_of
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.journal import MISSING, Journal, exchange
from jaxops.core.mesh import make_mesh

A, B = digest_of("a"), digest_of("b")


def parts(folder):
    return sorted(p.name for p in (folder / "journal").iterdir())


def test_what_was_recorded_is_found_by_the_next_run(tmp_path):
    with_none = {"score": 0.1 + 0.2, "why": "süß\n", "steps": [1, 2.5, None]}
    answers = [1.0, 0.1 + 0.2, 5e-324, -0.0, 1e308, 3, True, None, 2**70, with_none, {}]
    journal = Journal(tmp_path)
    assert not (tmp_path / "journal").exists()  # opening writes nothing
    for at, answer in enumerate(answers):
        assert journal.lookup(Key(1, at), A) is MISSING
        assert journal.record(Key(1, at), A, answer) == answer
    journal.flush()
    for source in (journal, Journal(tmp_path), Journal(tmp_path, process=3)):
        for at, answer in enumerate(answers):
            found = source.lookup(Key(1, at), A)
            assert found == answer and type(found) is type(answer)
            assert not isinstance(answer, float) or math.copysign(1, found) == math.copysign(1, answer)
        assert len(source) == source.found == len(answers) and source.asked_again == 0


def test_numbers_of_numpy_and_jax_come_back_as_pythons(tmp_path):
    journal = Journal(tmp_path)
    assert journal.record(Key(1, 1), A, np.float32(0.1)) == float(np.float32(0.1))
    assert journal.record(Key(1, 2), A, jnp.float32(2.5)) == 2.5
    assert journal.record(Key(1, 3), A, {"x": np.float32(0.5), "y": np.arange(2), "z": (1, 2)}) == {
        "x": 0.5,
        "y": [0, 1],
        "z": [1, 2],
    }
    assert journal.record(Key(np.int64(1), np.int32(4)), A, np.int64(7)) == 7
    again = Journal(tmp_path)
    assert again.lookup(Key(1, 3), A) == journal.lookup(Key(1, 3), A)
    assert again.lookup(Key(1, np.int64(4)), A) == 7


@pytest.mark.parametrize("answer", [math.nan, math.inf, -math.inf, np.float32("nan"), {"a": [1.0, math.nan]}])
def test_what_is_not_finite_is_refused_with_words(tmp_path, answer):
    with pytest.raises(UserError, match=r"answer for Key\(step=4, id=7.* must be finite, or None to drop the sample"):
        Journal(tmp_path).record(Key(4, 7), A, answer)
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("answer", ["good", [1.0], object(), {"a": object()}, {"a": {1, 2}}])
def test_what_is_no_answer_is_refused(tmp_path, answer):
    with pytest.raises(UserError, match=r"answer for Key\(step=4, id=7"):
        Journal(tmp_path).record(Key(4, 7), A, answer)


def test_every_part_of_a_key_tells_samples_apart(tmp_path):
    keys = [Key(1, 2), Key(2, 2), Key(1, 3), Key(1, 2, 1), Key(1, 2, 0, 1), Key(1, 2, 0, 0, 1)]
    journal = Journal(tmp_path)
    for at, key in enumerate(keys):
        journal.record(key, A, at)
    assert [Journal(tmp_path).lookup(key, A) for key in keys] == list(range(6))
    with pytest.raises(TypeError):
        journal.record(Key(1.5, 2), A, 0)


def test_another_question_is_asked_again_and_counted(tmp_path):
    journal = Journal(tmp_path)
    journal.record(Key(1, 2), A, 1.0)
    again = Journal(tmp_path)
    assert again.lookup(Key(1, 2), B) is MISSING
    assert (again.asked_again, again.found) == (1, 0)
    again.record(Key(1, 2), B, 2.0)
    third = Journal(tmp_path)  # the last counts
    assert third.lookup(Key(1, 2), B) == 2.0 and third.lookup(Key(1, 2), A) is MISSING


def test_a_digest_is_of_the_contents():
    same = [{"b": [1, 2.0], "a": "ü"}, {"a": "ü", "b": [1, 2.0]}, {"a": "ü", "b": (np.int32(1), np.float64(2))}]
    assert len({digest_of(each) for each in same}) == 1 and len(A) == 64
    tokens = np.arange(4, dtype=np.int32)
    others = ["[1]", b"[1]", [1], [1.5], {"x": tokens}, {"x": tokens[::-1]}, {"x": tokens.astype(np.int64)}]
    others += [{"x": tokens.reshape(2, 2)}, None, "", b"", math.nan]
    assert len({digest_of(each) for each in others}) == len(others)
    assert digest_of({"x": jnp.asarray(tokens)}) == digest_of({"x": tokens})
    with pytest.raises(TypeError, match="neither JSON nor an array"):
        digest_of({"x": object()})


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_a_kill_tore_is_left_out_and_never_written_behind(tmp_path, cut):
    journal = Journal(tmp_path)
    journal.record(Key(1, 1), A, 1.0)
    journal.record(Key(1, 2), A, 2.0)
    journal.close()
    (name,) = parts(tmp_path)
    path = tmp_path / "journal" / name
    os.truncate(path, path.stat().st_size - cut)
    again = Journal(tmp_path)
    assert again.lookup(Key(1, 1), A) == 1.0 and again.lookup(Key(1, 2), A) is MISSING
    assert again.unreadable == 1
    again.record(Key(1, 2), A, 3.0)
    third = Journal(tmp_path)
    assert (third.lookup(Key(1, 1), A), third.lookup(Key(1, 2), A)) == (1.0, 3.0)


@pytest.mark.parametrize(
    "bad",
    [
        b"\0" * 40,
        b"[]",
        b"7",
        b'{"v": 1}',
        b'{"v": 1, "key": [1], "digest": "x", "answer": 1}',
        b'{"v": 1, "key": [1, 2, 3, 4, 5, 6], "digest": "x", "answer": 1}',
        b'{"v": 1, "key": [1.5, 2], "digest": "x", "answer": 1}',
        b'{"v": 1, "key": [1, 2], "digest": 4, "answer": 1}',
        b'{"v": 1, "key": [1, 2], "digest": "x", "answer": NaN}',
        b'{"v": 1, "key": [1, 2], "digest": "x", "answer": "text"}',
        b"[" * 100_000,
    ],
)
def test_damaged_lines_are_left_out_and_counted(tmp_path, bad):
    journal = Journal(tmp_path)
    journal.record(Key(1, 1), A, 1.0)
    (tmp_path / "journal" / "000001-00001-000000.jsonl").write_bytes(bad + b"\n")
    again = Journal(tmp_path)
    assert (again.unreadable, len(again), again.lookup(Key(1, 1), A)) == (1, 1, 1.0)


def test_a_newer_format_is_said(tmp_path):
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "000001-00000-000000.jsonl").write_text(json.dumps({"v": 2}) + "\n")
    with pytest.raises(UserError, match=r"000000\.jsonl:1: format 2, but this version of jaxops reads up to 1"):
        Journal(tmp_path)


def test_parts_of_any_number_of_processes_are_merged(tmp_path):
    two = [Journal(tmp_path, process=rank) for rank in range(2)]
    for at in range(6):
        two[at % 2].record(Key(1, at), A, at)
    one = Journal(tmp_path)
    assert [one.lookup(Key(1, at), A) for at in range(6)] == list(range(6))
    one.record(Key(1, 3), B, 33)
    one.record(Key(1, 9), A, 9)
    four = [Journal(tmp_path, process=rank) for rank in range(4)]
    for journal in four:
        assert [journal.lookup(Key(1, at), A) for at in (0, 5, 9)] == [0, 5, 9]
        assert journal.lookup(Key(1, 3), B) == 33  # the later run's, whatever the numbers of the processes
    assert len(parts(tmp_path)) == 3


def test_a_fresh_run_forgets(tmp_path):
    journal = Journal(tmp_path, process=1)
    journal.record(Key(1, 1), A, 1.0)
    assert Journal(tmp_path, fresh=True).lookup(Key(1, 1), A) is MISSING
    assert parts(tmp_path) == []


def everything(folder):
    journal = Journal(folder)
    return {(key.step, key.id): entry.answer for key, entry in journal._entries.items()}


def test_trimming_keeps_what_a_replay_may_ask_for(tmp_path):
    for run in range(3):
        journals = [Journal(tmp_path, process=rank) for rank in range(2)]
        for step in (2 * run + 1, 2 * run + 2):
            for at in range(4):
                journals[at % 2].record(Key(step, at), A, step * 10 + at)
    before = everything(tmp_path)
    assert len(before) == 24
    for journal in journals:
        journal.trim(4)
        assert len(journal) == 8  # of step 4 those of all, of steps 5 and 6 its own
    kept = {key: answer for key, answer in before.items() if key[0] >= 4}
    assert everything(tmp_path) == kept
    # what was there before is one part now; each process goes on in a part of its own
    journals[0].record(Key(7, 0), A, 70)
    journals[1].record(Key(7, 1), A, 71)
    assert everything(tmp_path) == kept | {(7, 0): 70, (7, 1): 71}
    for journal in journals:
        journal.trim(8)
    assert everything(tmp_path) == {} and parts(tmp_path) == []
    journals[1].record(Key(8, 1), A, 81)
    assert everything(tmp_path) == {(8, 1): 81}


def test_trimming_bounds_the_folder(tmp_path):
    journal, sizes = Journal(tmp_path), []
    for step in range(1, 60):
        for at in range(8):
            journal.record(Key(step, at), A, at / 3)
        journal.flush()
        if step % 5 == 0:
            journal.trim(step - 10)
            sizes.append(sum(p.stat().st_size for p in (tmp_path / "journal").iterdir()))
    assert max(sizes) < 1.2 * sizes[4] and len(parts(tmp_path)) <= 2 and len(journal) <= 15 * 8
    assert set(everything(tmp_path)) == {(step, at) for step in range(45, 60) for at in range(8)}


def test_a_kill_while_trimming_loses_nothing(tmp_path, monkeypatch):
    for run in range(3):
        Journal(tmp_path).record(Key(run + 1, 0), A, run)
    before = everything(tmp_path)
    journal = Journal(tmp_path)

    class Killed(BaseException):
        pass

    real_replace, calls = os.replace, []

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            journal.trim(2)
    assert everything(tmp_path) == before
    assert not [name for name in parts(tmp_path) if name.endswith(".tmp")]  # swept by the next opening
    journal = Journal(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: calls.append(real_replace(*args)))
        patch.setattr(type(journal), "_remove", die)  # the new part is there, and the old ones still are
        with pytest.raises(Killed):
            journal.trim(2)
    assert calls
    left = everything(tmp_path)
    assert {key: left[key] for key in left if key[0] >= 2} == {(2, 0): 1, (3, 0): 2}


def test_flushing_is_durable_and_only_where_there_is_something(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    journal = Journal(tmp_path)
    journal.flush()
    assert synced == []
    journal.record(Key(1, 1), A, 1.0)
    journal.flush()
    name = "journal/000001-00000-000000.jsonl"
    assert synced == [str(tmp_path / name), str(tmp_path / "journal"), str(tmp_path)]
    journal.flush()
    journal.close()
    assert len(synced) == 3


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path):
    (tmp_path / "journal").write_text("a file")
    with pytest.raises(RunFailed, match=r"cannot write to .*journal"):
        Journal(tmp_path).record(Key(1, 1), A, 1.0)


def test_several_threads_record(tmp_path):
    journal = Journal(tmp_path)

    def some(start):
        for at in range(start, start + 100):
            journal.record(Key(1, at), A, {"text": "x" * at})

    threads = [threading.Thread(target=some, args=(100 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Journal(tmp_path)
    assert (len(again), again.unreadable) == (400, 0)


@needs_moto
def test_in_an_object_store_each_flush_is_an_object(s3):  # noqa: F811
    journal = Journal(s3)
    for step in (1, 2):
        for at in range(3):
            journal.record(Key(step, at), A, at)
        journal.flush()
        journal.flush()
    again = Journal(s3, process=1)
    assert len(again) == 6 and len(again._parts()) == 2
    other = Journal(s3)
    other.record(Key(3, 0), A, 5)
    other.trim(2)
    third = Journal(s3)
    assert {key.step for key in third._entries} == {2, 3} and len(third._parts()) == 2
    assert Journal(s3, fresh=True)._parts() == []


def test_one_process_exchanges_with_itself():
    answers = [None, 0.1, {"a": "ü" * 50}, 2**70]
    assert exchange(make_mesh(data=-1), 8, answers * 2) == answers * 2
    with pytest.raises(ValueError, match="3 answers for the 8 rows"):
        exchange(make_mesh(data=-1), 8, answers[:3])
    with pytest.raises(UserError, match="must be finite"):
        exchange(make_mesh(data=-1), 8, [math.nan] * 8)
