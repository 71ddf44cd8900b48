"""What a newcomer installs: pinned and hashed, few packages, and a wheel that works outside the checkout."""

import ast
import importlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
JAX_PACKAGES = {"jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain"}
OTHERS = {
    "numpy",
    "scipy",
    "etils",
    "jaxtyping",
    "pydantic",
    "PyYAML",
    "rich",
    "pyarrow",
    "tensorboardX",
    "matplotlib",
    "jinja2",
    "markupsafe",
}
TARGETS = "help install demo test test-slow test-latest lint peers lock clean"


def locked() -> list[Requirement]:
    """The pins of requirements.lock, hashes left out."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line.rstrip(" \\")) for line in lines if line and not line.startswith((" ", "#"))]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def run(*command: object, cwd: pathlib.Path, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_core_needs_these_and_no_more():
    needed = {Requirement(r).name for r in PROJECT["project"]["dependencies"]}
    assert needed == JAX_PACKAGES | OTHERS


def third_party(path: pathlib.Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it, and that are neither Python's nor ours."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"jaxops"}


def test_the_package_imports_only_what_it_asks_for():
    """Never what another package happens to bring, nor what only a developer's environment holds."""
    needed = JAX_PACKAGES | OTHERS
    extras = PROJECT["project"]["optional-dependencies"]
    optional = ("gcs", "s3", "wandb", "lm", "hf", "gguf", "judge", "postgres", "testing")
    needed |= {Requirement(r).name for extra in optional for r in extras[extra]}
    known, homes = {canonical(name) for name in needed}, importlib.metadata.packages_distributions()
    stray = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted(ROOT.joinpath("jaxops").rglob("*.py"))
        for name in sorted(third_party(path))
        if not known & {canonical(home) for home in homes.get(name, [name])}
    ]
    assert not stray, "\n".join(stray)


def test_the_extras_are_there():
    assert set(PROJECT["project"]["optional-dependencies"]) == {
        "tpu",
        "cuda",
        "gcs",
        "s3",
        "wandb",
        "sweep",
        "postgres",
        "lm",
        "hf",
        "gguf",
        "judge",
        "plan",
        "testing",
        "dev",
    }


def test_the_lock_names_packages_versions_and_hashes_only():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|git\+|\s@\s|^\s*-(?!-hash=)", text, re.MULTILINE)
    blocks = re.split(r"\n(?=\S)", text.strip())
    assert all(re.match(r"[A-Za-z0-9._-]+==\S+", block) for block in blocks)
    assert [block.split()[0] for block in blocks if "--hash=sha256:" not in block] == []


def test_the_lock_covers_what_the_project_and_its_developers_need():
    direct = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    direct += PROJECT["build-system"]["requires"]
    for need in map(Requirement, direct):
        pins = [r for r in locked() if canonical(r.name) == canonical(need.name)]
        assert pins, f"{need.name} is not in requirements.lock; run: make lock"
        for pin in pins:
            (version,) = [s.version for s in pin.specifier]
            assert need.specifier.contains(version), f"{pin} does not satisfy {need}; run: make lock"


def test_the_lock_pins_each_package_once_for_any_python():
    for version in ("3.11.7", "3.12.1", "3.13.0"):
        place = {"python_full_version": version, "python_version": version.rpartition(".")[0]}
        names = [canonical(r.name) for r in locked() if r.marker is None or r.marker.evaluate(place)]
        assert len(names) == len(set(names))
        assert canonical("jax") in names


@pytest.mark.latest
def test_installed_versions_satisfy_the_project():
    for need in map(Requirement, PROJECT["project"]["dependencies"]):
        assert need.specifier.contains(importlib.metadata.version(need.name)), need


@pytest.mark.latest
@pytest.mark.parametrize("module", ["jax", "flax.nnx", "optax", "orbax.checkpoint", "tensorstore", "grain"])
def test_the_jax_packages_import(module):
    importlib.import_module(module)


def test_the_makefile_has_its_targets():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    assert set(TARGETS.split()) <= targets
    helped = run("make", cwd=ROOT, MAKEFLAGS="")
    assert all(f"make {target}" in helped for target in TARGETS.split())


def installer(tmp_path: pathlib.Path, accel: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """tools/install.sh into an environment that is not there, so that it stops before anything is fetched."""
    command = ["sh", "tools/install.sh", str(tmp_path / "venv"), accel]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


def test_an_unknown_accelerator_is_refused(tmp_path):
    done = installer(tmp_path, "gpu")
    assert done.returncode == 2
    assert "ACCEL=gpu is not known; did you mean 'cuda'?" in done.stderr
    assert "auto, cpu, tpu, cuda" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_too_old_is_told_the_command_that_helps(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2"\n[ "$2" = "" ]\n')
    old.chmod(0o755)
    done = installer(tmp_path, "cpu", PYTHON=str(old))
    assert done.returncode == 2
    assert "is Python 3.9.2, jaxops needs Python 3.11 or newer" in done.stderr
    assert "run:  " in done.stderr
    assert not (tmp_path / "venv").exists()


def test_an_idle_accelerator_is_said_aloud(tmp_path):
    """With an environment that is complete and CPU-only, on a machine that has a GPU or a TPU."""
    venv, tools, devices = tmp_path / "venv", tmp_path / "tools", tmp_path / "dev"
    for folder in (venv / "bin", tools, devices):
        folder.mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    sums = [run("sh", "-c", f"cksum <{name}", cwd=ROOT).strip() for name in ("requirements.lock", "pyproject.toml")]
    (venv / ".jaxops-installed").write_text(f"lock {sums[0]}\nproject {sums[1]} {ROOT}\naccel cpu\n")
    place = {"ACCEL_DEVICES": str(devices), "PATH": f"{tools}:{os.environ['PATH']}"}

    assert "CPU-only" not in installer(tmp_path, "cpu", **place).stderr

    (tools / "nvidia-smi").write_text('#!/bin/sh\necho "GPU 0: NVIDIA H100"\n')
    (tools / "nvidia-smi").chmod(0o755)
    said = installer(tmp_path, "cpu", **place)
    assert said.returncode == 0
    assert "An NVIDIA GPU is here, but the jax in" in said.stderr and "make install ACCEL=cuda" in said.stderr

    (devices / "accel0").touch()
    said = installer(tmp_path, "cpu", **place)
    assert "A TPU is here, but the jax in" in said.stderr and "make install ACCEL=tpu" in said.stderr


@pytest.mark.slow
def test_the_wheel_is_whole_and_works_elsewhere(tmp_path):
    """Built without the network, installed alone, run from a folder that is not the checkout."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, ".", cwd=ROOT)
    (wheel,) = tmp_path.glob("jaxops-*.whl")

    inside = set(zipfile.ZipFile(wheel).namelist())
    files = [p for p in ROOT.joinpath("jaxops").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    configs = list(ROOT.joinpath("configs").rglob("*.yaml"))
    expected = {p.relative_to(ROOT).as_posix() for p in files}
    expected |= {"jaxops/" + p.relative_to(ROOT).as_posix() for p in configs}
    scripts = [p for p in ROOT.joinpath("launch").iterdir() if p.is_file()]
    expected |= {f"jaxops/launch/scripts/{p.name}" for p in scripts}
    assert configs and scripts and expected <= inside, sorted(expected - inside)
    assert not [n for n in inside if n.startswith(("tests/", "benchmarks/", "configs/"))]

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = pathlib.Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # This environment's dependencies, not its editable jaxops: path files in an added folder are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(python, "-c", "import jaxops; print(jaxops.__file__)", cwd=elsewhere, PYTHONPATH="").strip()
    assert pathlib.Path(where).is_relative_to(tmp_path)
    assert "train" in run(tmp_path / "venv" / "bin" / "jaxops", "--help", cwd=elsewhere, PYTHONPATH="")
    assert not list(elsewhere.iterdir())
