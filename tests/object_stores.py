"""A local S3 server (moto's, in a process of its own) and buckets in it, as fixtures."""

import atexit
import functools
import importlib.util
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fake_gcs
import pytest

from jaxops.core import stores
from jaxops.core.stores import Location, Store
from jaxops.run.folder import lease, mirror

needs_moto = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("moto", "flask_cors", "obstore")),
    reason="needs moto, flask-cors and obstore: pip install 'jaxops[dev]'",
)
_numbers = itertools.count()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@functools.cache
def s3_server() -> str:
    """The address of the one server of this test session."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return f"http://127.0.0.1:{port}"
        except OSError:
            assert server.poll() is None, "the S3 server did not start"
            time.sleep(0.05)
    raise AssertionError("the S3 server does not answer")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of a new bucket, with credentials for it in the environment and a jaxops cache of its own."""
    bucket = f"bucket-{next(_numbers)}"
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    move_to_new_machine(monkeypatch, tmp_path / "machine")
    monkeypatch.setattr(mirror, "EVERY", 0.2)
    monkeypatch.setattr(lease, "BEAT", 0.2)
    make_bucket(bucket)
    yield f"s3://{bucket}"


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The same of Google's store, as far as fake_gcs.py knows it."""
    server = fake_gcs.serve("bucket")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{server.server_port}")
    for name in ("TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
        monkeypatch.setenv(name, "")  # to be as before afterwards
        monkeypatch.delenv(name)
    move_to_new_machine(monkeypatch, tmp_path / "machine")
    monkeypatch.setattr(mirror, "EVERY", 0.2)
    monkeypatch.setattr(lease, "BEAT", 0.2)
    yield "gs://bucket"
    server.shutdown()
    server.server_close()


def make_bucket(name: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{s3_server()}/{name}", method="PUT")).close()


def move_to_new_machine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """From now on as on a machine that has seen nothing of a run."""
    monkeypatch.setenv("JAXOPS_CACHE", str(cache))


def bucket_of(url: str) -> tuple[Store, Location]:
    place = stores.parse_url(url)
    return stores.open_store(place), place


def objects(url: str) -> set[str]:
    """Names below a URL."""
    store, place = bucket_of(url)
    return {entry.key[len(place.key) :].lstrip("/") for entry in store.entries(place.key)}
