"""A judge that is asked by real processes, which are stopped and killed: nothing is asked twice, and all agree."""

import collections
import json
import signal
import time
from pathlib import Path

import pytest
from processes import Together

CODE = """
from jaxops.core.interrupt import Interrupt
from jaxops.core.answers import Key, digest_of
from jaxops.core.journal import MISSING, Journal, exchange
from jaxops.core.mesh import make_mesh
from jaxops.core import rows
folder, steps, question, die_at = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
mesh = make_mesh(tensor=-1)
size = 8
journal = Journal(folder)

def note(name, text):
    with open(f"{folder}/{name}", "a") as file:
        file.write(text)

def judge(step, id, text):
    note("asked.txt", f"{step} {id}\\n")
    if (step, id) == (2, 6):
        note("slow.txt", f"{rank}")
        time.sleep(1.5)
    return None if id % 4 == 3 else {"score": id / 3 + step, "asked by": rank}

def scores(step, batch):
    answers = []
    for id in rows.owned(mesh, batch)["id"]:
        key, asked = Key(step, int(id)), {"text": question, "id": int(id)}
        answer = journal.lookup(key, digest_of(asked))
        if answer is MISSING:
            answer = journal.record(key, digest_of(asked), judge(*key[:2], asked))
        answers.append(answer)
        if die_at == [rank, step, len(answers)]:
            os.kill(os.getpid(), signal.SIGKILL)
    journal.flush()
    return exchange(mesh, size, answers)

interrupt = Interrupt()
with interrupt.installed():
    for step in range(1, steps + 1):
        start = 0 if step % 2 else 2
        ids = np.arange(start, start + size, dtype=np.int32)
        ranges = rows.local_rows(mesh, size) or [(0, size)]
        batch = rows.global_arrays(mesh, size)({"id": np.concatenate([ids[slice(*each)] for each in ranges])})
        print(json.dumps([step, scores(step, batch)]), flush=True)
        if interrupt():
            break
print(json.dumps({"asked_again": journal.asked_again, "unreadable": journal.unreadable}))
"""


def start(folder: Path, steps: int = 6, question: str = "how good?", die_at: list | None = None, count: int = 2):
    return Together(CODE, folder, steps, question, json.dumps(die_at), count=count, devices=2 // count)


def asked(folder: Path) -> collections.Counter:
    lines = (folder / "asked.txt").read_text().splitlines()
    return collections.Counter(tuple(map(int, line.split())) for line in lines)


def every(steps: int) -> set[tuple[int, int]]:
    return {(step, id + (0 if step % 2 else 2)) for step in range(1, steps + 1) for id in range(8)}


def assert_agreed(said: list[str], steps: int) -> None:
    """All processes had the same answers at every step, in the order of the rows, each by one that owned the row."""
    first, *others = [[json.loads(line) for line in out.splitlines()][:-1] for out in said]
    assert all(other == first for other in others)
    assert [step for step, _ in first] == list(range(1, steps + 1))
    for step, answers in first:
        ids = [id + (0 if step % 2 else 2) for id in range(8)]
        assert [answer and answer["score"] for answer in answers] == [
            None if id % 4 == 3 else id / 3 + step for id in ids
        ]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_sigterm_during_a_slow_answer_asks_nothing_twice(tmp_path):
    with start(tmp_path, 40) as job:
        wait_for(tmp_path / "slow.txt")
        job.signal(signal.SIGTERM, [0])
        said = job.end()
    done = len(said[0].splitlines()) - 1
    assert 2 <= done < 40
    assert_agreed(said, done)
    with start(tmp_path, done + 1) as job:
        said = job.end()
    assert_agreed(said, done + 1)
    assert asked(tmp_path) == dict.fromkeys(every(done + 1), 1)
    by = [
        answer["asked by"] for _, answers in map(json.loads, said[0].splitlines()[:-1]) for answer in answers if answer
    ]
    assert set(by) == {0, 1}


@pytest.mark.slow
def test_after_a_kill_only_what_was_in_flight_is_asked_again(tmp_path):
    with start(tmp_path) as job:
        wait_for(tmp_path / "slow.txt")
        job.signal(signal.SIGKILL, [0, 1])
        job.end(-signal.SIGKILL)
    with start(tmp_path) as job:
        assert_agreed(job.end(), 6)
    assert set(asked(tmp_path)) == every(6)
    assert {key for key, times in asked(tmp_path).items() if times > 1} == {(2, 6)}


@pytest.mark.slow
def test_a_kill_before_the_flush_then_one_process_then_another_question(tmp_path):
    with start(tmp_path, die_at=[1, 3, 2]) as job:
        job.processes[1].wait(timeout=60)
        job.signal(signal.SIGKILL, [0])
        job.end(-signal.SIGKILL)
    with start(tmp_path, count=1) as job:
        said = job.end()
    assert_agreed(said, 6)
    assert json.loads(said[0].splitlines()[-1]) == {"asked_again": 0, "unreadable": 0}
    assert set(asked(tmp_path)) == every(6)
    # the kill came right after a record, so all that was recorded is found; only process 0's own kill may cut one short
    assert sum(times - 1 for times in asked(tmp_path).values()) <= 1
    with start(tmp_path, 2, question="how bad?") as job:
        said = job.end()
    assert_agreed(said, 2)
    again = [json.loads(out.splitlines()[-1])["asked_again"] for out in said]
    assert again == [8, 8] and all(asked(tmp_path)[key] >= 2 for key in every(2))
