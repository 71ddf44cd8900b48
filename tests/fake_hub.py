"""As much of the Hugging Face Hub's API as huggingface_hub asks for to fetch a model, in memory.

Written from what the library sends and takes; the real Hub was not at hand. `Hub.models[name]` maps a commit to its
files, `Hub.refs[name]` a branch or tag to its commit.
"""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants as constants
import pytest


class Hub:
    """The models of the hub, and a note of every request."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.token: str | None = None
        self.status: int | None = None
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.url = ""

    def commit(self, model: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds a commit to a branch and returns its name."""
        before = self.refs.setdefault(model, {}).get(branch, "")
        name = hashlib.sha1(before.encode() + b"".join(sorted(files.values())) + b"".join(map(str.encode, files)))
        self.models.setdefault(model, {})[name.hexdigest()] = dict(files)
        self.refs[model][branch] = name.hexdigest()
        return name.hexdigest()

    def fetched(self) -> set[str]:
        """The files whose bytes were asked for since the last call."""
        found = {line.rpartition("/")[2] for line in self.asked if line.startswith("GET") and "/resolve/" in line}
        self.asked.clear()
        return found


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; `hub` is set by `serve`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        sent = self.headers.get("authorization")
        self.hub.tokens.add(sent)
        if self.hub.status is not None:
            return self._send(b"out of order", status=self.hub.status)
        parts = path.removeprefix("api/models/").split("/")
        model, what = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "revision"
        if model not in self.hub.models:
            return self._send(b"{}", **({"status": 404, "code": "RepoNotFound"} if sent else {"status": 401}))
        if what == "refs":
            names = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": c} for name, c in self._refs(model)]
            return self._send(json.dumps({"branches": names, "tags": [], "converts": []}).encode())
        # A revision may have slashes in it, as refs/pr/1 has: the longest one that is known is meant.
        rest = parts[3:] or ["main"]
        known = ["/".join(rest[:size]) for size in range(len(rest), 0, -1)]
        revision = next((one for one in known if self._commit(model, one)), None)
        if revision is None:
            return self._send(b"{}", status=404, code="RevisionNotFound")
        commit = self._commit(model, revision)
        files = self.hub.models[model][commit]
        if what == "revision":
            there = {"id": model, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self._send(json.dumps(there).encode())
        if what == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                for name, x in files.items()
            ]
            return self._send(json.dumps(rows).encode())
        name = "/".join(rest[len(revision.split("/")) :])
        if model in self.hub.gated and sent != f"Bearer {self.hub.token}":
            return self._send(b"{}", status=403, code="GatedRepo", commit=commit)
        if name not in files:
            return self._send(b"{}", status=404, code="EntryNotFound", commit=commit)
        return self._send(files[name], commit=commit)

    def _refs(self, model: str) -> list[tuple[str, str]]:
        return list(self.hub.refs[model].items())

    def _commit(self, model: str, revision: str) -> str | None:
        known = revision in self.hub.models[model]
        return revision if known else self.hub.refs[model].get(revision)

    def _send(self, data: bytes, status: int = 200, code: str | None = None, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        if code is not None:
            self.send_header("X-Error-Code", code)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing is written: a test's output is its own."""


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Serves a hub on a free port of this machine."""
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def hub_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the library in this process asks, with an empty cache and no token.

    The library reads its variables once, when it is imported: so what it made of them is replaced.
    """
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub
        huggingface_hub.close_session()
