"""Signals become a flag; the second Ctrl-C does not wait."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from jaxops.core.interrupt import EXIT_NOW, Interrupt

CHILD = """
import time
from jaxops.core.interrupt import Interrupt
poll = Interrupt(say=lambda text: print(text, flush=True))
with poll.installed():
    print("ready", flush=True)
    while not (poll() and {leave}):
        time.sleep(0.01)
print("saved", poll.signal, flush=True)
"""


def child(leave):
    code = CHILD.format(leave=leave)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_sets_the_flag_and_handlers_are_put_back(number):
    said, before = [], [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    interrupt = Interrupt(said.append)
    with interrupt.installed() as same:
        assert same is interrupt and not interrupt()
        os.kill(os.getpid(), number)
        assert interrupt() and interrupt.signal == number.name
    assert said == [f"{number.name}: saving at the next step (Ctrl-C again exits at once)"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), Interrupt().installed():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt().installed() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_anyone_may_ask():
    interrupt = Interrupt()
    interrupt.request("window closed")
    assert interrupt() and interrupt.signal == "window closed"


def test_outside_the_main_thread_nothing_is_installed():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with Interrupt().installed() as interrupt:
            seen.append((interrupt(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_leaves_in_its_own_time(number):
    process = child(leave=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith(f"saved {number.name}\n")


def test_the_second_ctrl_c_exits_at_once():
    process = child(leave=False)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("SIGINT: saving")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_NOW == 130 and "saved" not in out


def test_called_from_python_the_second_ctrl_c_raises_and_the_process_lives():
    said = []
    with pytest.raises(KeyboardInterrupt), Interrupt(said.append, exits=False).installed() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == "SIGINT" and said == ["SIGINT: saving at the next step (Ctrl-C again stops at once)"]
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_sigterm_still_waits_once():
    process = child(leave=False)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline().startswith("SIGTERM")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline().startswith("SIGTERM")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("SIGINT")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_NOW
