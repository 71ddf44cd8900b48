"""The tar of the code: the same bytes for the same files, and nothing that should not travel."""

import io
import os
import subprocess
import tarfile

import pytest

from jaxops.core.failures import UserError
from jaxops.launch.code import bundle


@pytest.fixture
def repository(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("runs/\n*.bin\n")
    (tmp_path / "train.py").write_text("print(1)\n")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "run.sh").write_text("true\n")
    (tmp_path / "inner" / "run.sh").chmod(0o755)
    (tmp_path / "data.bin").write_text("ignored")
    (tmp_path / "link").symlink_to("train.py")
    return tmp_path


def test_it_holds_what_git_would_and_is_the_same_whenever_it_is_made(repository):
    first = bundle(repository / "inner")
    assert first.files == (".gitignore", "inner/run.sh", "link", "train.py") and first.inside == "inner"
    os.utime(repository / "train.py", (1, 1))
    (repository / "train.py").chmod(0o600)
    subprocess.run(["git", "-C", repository, "add", "."], check=True)
    second = bundle(repository)
    assert (second.tar, second.sha256, second.inside) == (first.tar, first.sha256, ".")
    with tarfile.open(fileobj=io.BytesIO(first.tar)) as tar:
        entries = {e.name: e for e in tar.getmembers()}
    assert {name: (e.mode, e.mtime, e.uid) for name, e in entries.items()}["inner/run.sh"] == (0o755, 0, 0)
    assert entries["link"].linkname == "train.py" and entries["train.py"].mode == 0o644
    (repository / "train.py").write_text("print(2)\n")
    assert bundle(repository).sha256 != first.sha256


def test_a_file_that_is_deleted_and_not_committed_is_left_out(repository):
    subprocess.run(["git", "-C", repository, "add", "."], check=True)
    (repository / "train.py").unlink()
    (repository / "link").unlink()
    assert bundle(repository).files == (".gitignore", "inner/run.sh")


@pytest.mark.parametrize(
    "name", [".env", ".env.local", "prod.env", "id_rsa", "inner/key.pem", "service-account-7.json", "Credentials.json"]
)
def test_what_may_hold_a_secret_is_refused(repository, name):
    (repository / name).write_text("TOKEN=1")
    with pytest.raises(UserError, match=r"may hold a secret.*--secret NAME"):
        bundle(repository)
    (repository / ".gitignore").write_text(f"*.bin\n/{name}\n")
    bundle(repository)


def test_an_example_of_such_a_file_is_none(repository):
    (repository / ".env.example").write_text("TOKEN=\n")
    assert ".env.example" in bundle(repository).files


def test_a_tar_too_large_names_the_largest_files(repository):
    (repository / "weights.dat").write_bytes(bytes(3 << 20))
    with pytest.raises(UserError, match=r"3 MiB in .*weights\.dat \(3 MiB\)"):
        bundle(repository, most=1 << 20)


def test_a_folder_in_no_repository_is_refused(tmp_path):
    with pytest.raises(UserError, match="git init"):
        bundle(tmp_path)


def test_a_link_out_of_the_repository_is_refused(repository):
    (repository / "out").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="leads out"):
        bundle(repository)


def test_a_repository_inside_is_said(repository):
    inner = repository / "sub"
    subprocess.run(["git", "init", "-q", inner], check=True)
    (inner / "a.py").write_text("")
    subprocess.run(["git", "-C", inner, "add", "."], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", inner, *who, "commit", "-qm", "a"], check=True)
    subprocess.run(["git", "-C", repository, "add", "sub"], check=True, capture_output=True)
    with pytest.raises(UserError, match="repository of its own"):
        bundle(repository)
