"""launch/Dockerfile copies and runs setup_host.sh and does nothing else; its RUN line makes an environment."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from test_setup_host import wheelhouse

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in (ROOT / "launch" / "Dockerfile").read_text().splitlines() if line and line[0] != "#"]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def test_it_copies_and_runs_the_host_script_alone():
    names = [name for name, _ in instructions()]
    assert names == ["ARG", "FROM", "ARG", "ARG", "COPY", "RUN"]
    copied = dict(instructions())["COPY"].split()
    assert copied == ["setup_host.sh", "${LOCK}", "/opt/setup/"]
    assert (ROOT / "launch" / "setup_host.sh").is_file()


def test_its_run_line_makes_an_environment_here(tmp_path):
    """What docker would run, in a shell with nothing but a Python: /opt lies in a folder of the test."""
    pin = wheelhouse(tmp_path / "wheels")
    setup = tmp_path / "opt" / "setup"
    setup.mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "setup_host.sh", setup)
    (setup / "requirements.lock").write_text(pin)
    line = dict(instructions())["RUN"].replace("/opt/", f"{tmp_path}/opt/")
    values = {"ACCEL": "cpu", "LOCK": "requirements.lock"}
    line = re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], line)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-c", f"{line} {tmp_path}/wheels"], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "opt" / "jaxops" / "bin" / "python").exists()
