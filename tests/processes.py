"""Several real processes that run one Python program as one job, for tests of what they do together."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]

START = """
import json, os, signal, sys, time
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))
from jaxops.core import distributed
distributed.initialize()
rank = jax.process_index()
"""
END = """
distributed.shut_down()
"""


class Together:
    """`count` processes that run `code`, with `devices` CPU devices each; a context, which kills what is left."""

    def __init__(self, code: str, *argv: object, count: int = 2, devices: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"JAXOPS_COORDINATOR": f"127.0.0.1:{port}", "JAXOPS_NUM_PROCESSES": str(count)} if count > 1 else {}
        env = {**os.environ, "PYTHONPATH": str(ROOT), "DEVICES": str(devices), **job}
        env.pop("XLA_FLAGS", None)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", START + code + END, *map(str, argv)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**env, "JAXOPS_PROCESS_ID": str(rank)} if count > 1 else env,
            )
            for rank in range(count)
        ]

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def signal(self, number: signal.Signals, ranks: Iterable[int]) -> None:
        for rank in ranks:
            self.processes[rank].send_signal(number)

    def end(self, expected: int = 0) -> list[str]:
        """What each printed, once all have ended with the exit status that is expected."""
        said = [process.communicate(timeout=120) for process in self.processes]
        codes = [process.returncode for process in self.processes]
        assert codes == [expected] * len(codes), f"{codes}: {said[0][1][-2000:]}"
        return ["".join(line for line in out.splitlines(True) if "Gloo" not in line) for out, _ in said]
