"""A search's journal in a real Postgres, where Debian's is installed: kills lose nothing there either."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from stand_in import searched
from test_search_crashes import killed_at_ten_moments

from jaxops.core.failures import RunFailed, UserError
from jaxops.sweep.records import read_plan
from jaxops.sweep.results import read_outcome
from jaxops.sweep.search.events import SearchEvent
from jaxops.sweep.search.postgres import PostgresJournal

pytestmark = pytest.mark.slow
psycopg = pytest.importorskip("psycopg")
pytest.importorskip("optuna")


def programs() -> Path:
    """The folder of Debian's newest Postgres; skips in words where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.skip("no Postgres on this machine (Debian: apt-get install postgresql): it was not tried")
    return found[-1].parent


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The URL of a server of its own, in a folder of its own; its settings make the variables of the environment."""
    bin, home = programs(), tmp_path_factory.mktemp("postgres")
    user = "postgres" if os.getuid() == 0 else getpass.getuser()  # it refuses to run as root
    as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if os.getuid() == 0 else []
    if as_user:
        shutil.chown(home, user, user)
        for parent in (home.parent, *home.parent.parents[:1]):
            parent.chmod(0o755)
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = lambda *argv: subprocess.run([*as_user, *argv], check=True, capture_output=True, cwd="/", timeout=120)
    run(bin / "initdb", "-D", home / "data", "-U", "sweeper", "--auth=trust", "--no-sync")
    options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off"
    run(bin / "pg_ctl", "-D", home / "data", "-l", home / "log", "-w", "-o", options, "start")
    try:
        yield f"postgresql://127.0.0.1:{port}/postgres"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):  # where it has ended with its folder
            run(bin / "pg_ctl", "-D", home / "data", "-m", "immediate", "stop")


@pytest.fixture(autouse=True)
def as_sweeper(monkeypatch):
    monkeypatch.setenv("PGUSER", "sweeper")


def rows(url: str) -> int:
    with psycopg.connect(url) as connection:
        (there,) = connection.execute("SELECT to_regclass('jaxops_search') IS NOT NULL").fetchone()
        return connection.execute("SELECT count(*) FROM jaxops_search").fetchone()[0] if there else 0


def test_a_controller_killed_with_9_at_ten_moments_loses_no_trial(toy, postgres):
    killed_at_ten_moments([f"search.storage={postgres}"], lambda: rows(postgres))
    with contextlib.closing(PostgresJournal(postgres, "find")) as journal:
        events = journal.read()
    assert [e.trial for e in events if e.what == "ask"] == list(range(16))
    assert sorted(e.trial for e in events if e.what == "tell") == list(range(16))
    assert not Path("runs/find/search.jsonl").exists()


def test_one_leads_and_a_lost_connection_writes_nothing_over(postgres):
    first, second = PostgresJournal(postgres, "one"), PostgresJournal(postgres, "one")
    other = PostgresJournal(postgres, "two")
    assert first.lead() and not second.lead() and other.lead()
    first.append(SearchEvent("begin", 0, {"a": 0.1}))
    with psycopg.connect(postgres, autocommit=True) as admin:  # the network, or the server, drops the leader
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s",
            (first._connection.info.backend_pid,),
        )
    assert second.lead()
    second.append(SearchEvent("ask", 0, {"point": "x"}))
    with pytest.raises(RunFailed, match="Nothing is lost"):
        first.append(SearchEvent("ask", 0, {"point": "y"}))
    second._next = 1  # as if it had not heard of its own row
    with pytest.raises(RunFailed, match="cannot be used"):
        second.append(SearchEvent("ask", 0, {"point": "z"}))
    assert [(e.what, dict(e.fields)) for e in second.read()] == [("begin", {"a": 0.1}), ("ask", {"point": "x"})]
    assert other.read() == []
    for journal in (first, second, other):
        journal.close()


def test_a_whole_search_and_a_wrong_address(toy, postgres, monkeypatch):
    searched(toy, f"search.storage={postgres}", "name=whole")
    outcome = read_outcome(read_plan(Path("runs/whole")))
    assert outcome.left == 0 and outcome.count("failed") == 0
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "2")
    with pytest.raises(UserError, match=r"search\.storage: .*refused"):
        PostgresJournal("postgresql://127.0.0.1:1/postgres", "none")
