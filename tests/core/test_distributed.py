"""How a job is read from the environment; what one process does alone. tests/recovery has real processes."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from jaxops.core import distributed
from jaxops.core.failures import EXIT_LOST, Lost, UserError

WHOLE = {"JAXOPS_COORDINATOR": "host0:1234", "JAXOPS_NUM_PROCESSES": "4", "JAXOPS_PROCESS_ID": "3"}


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize was called with; it joins nothing, and the hook is put back."""
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr("sys.excepthook", sys.excepthook)  # put back afterwards
    return calls


def test_without_a_job_nothing_is_joined(joined):
    assert distributed.initialize({}) is False
    assert distributed.initialize({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}) is False
    assert distributed.initialize({"SLURM_NTASKS": "8"}) is False  # an allocation, and no step of it
    assert joined == []


def test_a_job_by_hand(joined):
    assert distributed.initialize({**WHOLE, "JAXOPS_HEARTBEAT_SECONDS": "20"}) is True
    assert joined == [
        {
            "coordinator_address": "host0:1234",
            "num_processes": 4,
            "process_id": 3,
            "initialization_timeout": 360,
            "heartbeat_timeout_seconds": 20,
            "shutdown_timeout_seconds": 15,
        }
    ]


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-8]"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "x"},
    ],
)
def test_what_jax_finds_by_itself_is_left_to_it(joined, env):
    assert distributed.initialize(env) is True
    assert "coordinator_address" not in joined[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAXOPS_COORDINATOR": ""}, "JAXOPS_NUM_PROCESSES, JAXOPS_PROCESS_ID set without JAXOPS_COORDINATOR"),
        ({"JAXOPS_PROCESS_ID": ""}, "set without JAXOPS_PROCESS_ID"),
        ({"JAXOPS_COORDINATOR": "host0"}, "JAXOPS_COORDINATOR=host0: expected host:port"),
        ({"JAXOPS_NUM_PROCESSES": "four"}, "JAXOPS_NUM_PROCESSES=four"),
        ({"JAXOPS_PROCESS_ID": "4"}, "JAXOPS_PROCESS_ID=4"),
        ({"JAXOPS_HEARTBEAT_SECONDS": "soon"}, "JAXOPS_HEARTBEAT_SECONDS=soon: expected a whole number of seconds"),
        ({"JAXOPS_INIT_SECONDS": "0"}, "JAXOPS_INIT_SECONDS=0"),
    ],
)
def test_half_a_job_is_refused(joined, change, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        distributed.initialize({**WHOLE, **change})
    assert joined == []


def test_alone_everything_is_decided_here():
    assert distributed.run_on_primary("x", lambda: {"a": 1}) == {"a": 1}
    assert distributed.gather("x", 3) == [3]
    assert distributed.is_primary() and not distributed.is_distributed()
    distributed.barrier("nobody")
    distributed.announce_phase("x")
    distributed.announce_failure(ValueError("x"), "x")
    distributed.shut_down()
    error = distributed.jax.errors.JaxRuntimeError("INTERNAL: x")
    assert distributed.explain_lost(error, "x") is error


_LISTENING = """
import os, re
from jaxops.core import distributed
distributed.initialize()
links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
ours = {os.readlink(link) for link in links if os.path.islink(link)}
for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in open(table).read().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in ours:
            print(fields[1].partition(":")[0], int(fields[1].partition(":")[2], 16))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_coordinator_of_one_machine_listens_to_that_machine_alone():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"JAXOPS_COORDINATOR": f"127.0.0.1:{port}", "JAXOPS_NUM_PROCESSES": "1", "JAXOPS_PROCESS_ID": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _LISTENING], env={**os.environ, **job}, capture_output=True, text=True, timeout=120
    )
    found = dict(reversed(line.split()) for line in done.stdout.splitlines())
    # 127.0.0.1, alone or as IPv6 writes it, in the kernel's byte order
    assert found[str(port)] in ("0100007F", "0000000000000000FFFF00000100007F"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1:1", True), ("localhost:1", True), ("[::1]:1", True), ("10.0.0.4:1", False), ("host-0:1", False)],
)
def test_an_address_of_this_machine_alone_is_told(address, loopback):
    assert distributed._is_loopback(address) == loopback


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("UNAVAILABLE: Socket closed", True),
        ("INTERNAL: Failed to launch: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered", True),
        ("INTERNAL: TPU worker is unhealthy", True),
        ("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered", False),
        ("RESOURCE_EXHAUSTED: Out of memory; UNAVAILABLE", False),
        ("INVALID_ARGUMENT: Executable expected shape", False),
    ],
)
def test_lost_devices_are_told_from_a_mistake_in_the_program(text, lost):
    error = jax.errors.JaxRuntimeError(text)
    told = distributed.explain_lost(error, "train, step 3")
    if not lost:
        assert told is error
        return
    assert isinstance(told, Lost) and told.status == EXIT_LOST == 76
    assert "(train, step 3); the same command resumes" in str(told) and text[:40] in str(told)
