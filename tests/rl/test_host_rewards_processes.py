"""Two real processes: each sample is asked by one of them, all get all answers, and a kill costs what was in flight."""

import collections
import json
import signal
from pathlib import Path

import pytest
from processes import Together

CODE = """
sys.path.insert(0, sys.argv[2])
from jaxops.config.bypath import ByPath
from jaxops.core.answers import Key
from jaxops.core.journal import Journal
from jaxops.core.mesh import make_mesh
from jaxops.core.rows import owned_rows
from jaxops.rl.rewards.combine import combined, host_scores
from jaxops.rl.rewards.config import FunctionReward
from jaxops.rl.rewards.function import Asked
from jaxops.rl.rewards.host import HostRewards

folder, on_error = sys.argv[1], sys.argv[3]
rewards = [FunctionReward(fn=ByPath("judges:noted", {"folder": folder}), on_error=on_error)]
size, mesh = 16, make_mesh(data=-1)
host = HostRewards(rewards, Journal(folder), say=lambda text: None)
rows = [row for start, stop in owned_rows(mesh, size) for row in range(start, stop)]
mine = host.score([Asked(Key(1, row), f"prompt {row}", "x" * row) for row in rows], lambda: False)
everything = host.all(mesh, size, mine)
found = host_scores(everything, host.names)
total = combined(found.scores, rewards, found.weight)
shares = {name: entry.value().item() for name, entry in found.sums.items()}
print(json.dumps([total.score.tolist(), found.weight.tolist(), shares]), flush=True)
"""

JUDGES = """
import os, signal

def noted(prompts, completions, folder):
    for prompt, completion in zip(prompts, completions):
        if completion == "xxx":
            raise ValueError("three")
    for prompt in prompts:
        with open(f"{folder}/asked.txt", "a") as file:
            file.write(f"{prompt.split()[1]}\\n")
    if "prompt 13" in prompts and os.path.exists(f"{folder}/die"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(completion)) for completion in completions]
"""


def start(folder: Path, on_error: str = "drop") -> Together:
    (folder / "judges.py").write_text(JUDGES)
    return Together(CODE, folder, folder, on_error)


@pytest.mark.slow
def test_two_processes_share_the_asking_and_agree(tmp_path):
    with start(tmp_path) as job:
        one, other = job.end()
    assert one == other
    scores, weight, shares = json.loads(one)
    assert scores == [0.0 if row == 3 else float(row) for row in range(16)]
    assert weight == [float(row != 3) for row in range(16)]
    assert shares == {"reward_errors/noted": 1 / 16, "reward_timeouts/noted": 0.0, "reward_dropped/noted": 1 / 16}
    times = collections.Counter((tmp_path / "asked.txt").read_text().split())
    assert times == {str(row): 1 for row in range(16) if row != 3}
    with start(tmp_path) as job:
        assert job.end() == [one, other]
    assert collections.Counter((tmp_path / "asked.txt").read_text().split()) == times


@pytest.mark.slow
def test_after_a_kill_only_the_call_in_flight_is_made_again(tmp_path):
    (tmp_path / "die").touch()
    with start(tmp_path) as job:
        job.processes[1].wait(timeout=60)
        job.signal(signal.SIGKILL, [0])
        job.end(-signal.SIGKILL)
    before = collections.Counter((tmp_path / "asked.txt").read_text().split())
    assert before["13"] == 1 and before["8"] == 1
    (tmp_path / "die").unlink()
    with start(tmp_path) as job:
        one, other = job.end()
    assert one == other and json.loads(one)[0] == [0.0 if row == 3 else float(row) for row in range(16)]
    times = collections.Counter((tmp_path / "asked.txt").read_text().split())
    again = {row for row, count in times.items() if count > 1}
    assert {"12", "13"} <= again and not {"8", "9", "10", "11", "14", "15"} & again


@pytest.mark.slow
def test_a_reward_that_stops_one_process_ends_all(tmp_path):
    with start(tmp_path, "stop") as job:
        said = [process.communicate(timeout=120)[1] for process in job.processes]
        assert all(process.returncode == 1 for process in job.processes)
    assert "example 3, copy 0: it raised ValueError: three (" in said[0] and "ValueError: three" in said[1]
    assert "12" in (tmp_path / "asked.txt").read_text().split()
