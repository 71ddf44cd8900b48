"""The trial of a store before a run: what tensorstore may not do is told then, not at the first save."""

import http.client
import http.server
import threading
import urllib.parse

import fake_gcs
import pytest
from object_stores import gs, needs_moto, objects, s3, s3_server  # noqa: F401 (fixtures)

from jaxops.core import store_probe, stores
from jaxops.core.failures import UserError

pytestmark = needs_moto


@pytest.fixture
def refusing(s3, monkeypatch):  # noqa: F811
    """Puts a server before the bucket that refuses what `is_refused(command, path, headers)` says; gives its URL."""
    asked, refused = [], []
    upstream = urllib.parse.urlsplit(s3_server()).netloc

    class Between(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            asked.append((self.command, self.path, self.headers.get("user-agent", "")))
            for is_refused, status, code in refused:
                if is_refused(self.command, self.path, self.headers):
                    return self.send(status, {}, f"<Error><Code>{code}</Code><Message>No.</Message></Error>".encode())
            link = http.client.HTTPConnection(upstream)
            link.request(self.command, self.path, body, dict(self.headers))
            reply = link.getresponse()
            kept = {name: value for name, value in reply.getheaders() if name.lower() in ("etag", "last-modified")}
            return self.send(reply.status, kept, reply.read())

        def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Between)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield s3, refused, asked
    server.shutdown()
    server.server_close()


def of_tensorstore(headers) -> bool:
    return "tensorstore" in headers.get("user-agent", "")


def test_all_that_a_save_does_is_done_by_tensorstore_and_nothing_stays(refusing):
    url, _, asked = refusing
    store_probe.check_access(f"{url}/runs/x")
    done = {
        (command, path.partition("?")[0].rpartition("/")[2]) for command, path, who in asked if "tensorstore" in who
    }
    assert {("PUT", "manifest.ocdbt"), ("GET", "manifest.ocdbt"), ("DELETE", "manifest.ocdbt")} <= done
    keys = [path for command, path, _ in asked if command in ("PUT", "DELETE") and path.count("/") > 1]
    assert keys and all("/runs/x/.probe-" in path for path in keys)
    assert objects(url) == set()


@pytest.mark.parametrize(
    ("is_refused", "status", "code", "told"),
    [
        (lambda command, path, headers: command == "PUT", 403, "AccessDenied", "cannot write there: .*must be allowed"),
        (lambda command, path, headers: command == "DELETE", 403, "AccessDenied", "cannot delete there: .*be allowed"),
        (lambda command, path, headers: "if-none-match" in headers, 501, "NotImplemented", "cannot write there"),
    ],
    ids=["writing", "deleting", "writing on condition"],
)
def test_what_tensorstore_alone_may_not_do_is_told_before_the_run(refusing, is_refused, status, code, told):
    url, refused, _ = refusing
    refused.append((lambda *asked: of_tensorstore(asked[2]) and is_refused(*asked), status, code))
    with pytest.raises(UserError, match=rf"runs: tensorstore, which saves the arrays, {told}") as caught:
        store_probe.check_access(f"{url}/runs")
    assert code in str(caught.value)
    assert objects(url) == set()


def test_reading_alone_tries_no_write(refusing):
    url, refused, _ = refusing
    refused.append((lambda command, path, headers: command != "GET", 403, "AccessDenied"))
    store_probe.check_access(f"{url}/runs", write=False)


def test_the_same_in_googles_store(gs, monkeypatch):  # noqa: F811
    def refuse(self) -> None:  # the JSON API, which obstore does not use
        self._body()
        self._send(403, b"{}")

    monkeypatch.setattr(fake_gcs.Handler, "do_POST", refuse)
    with pytest.raises(UserError, match=r"gs://bucket/runs: tensorstore.* cannot write there: PERMISSION_DENIED"):
        store_probe.check_access(f"{gs}/runs")
    assert objects(gs) == set()


def test_a_store_that_leaves_tensorstore_without_an_answer_is_told_in_seconds(gs, monkeypatch):  # noqa: F811
    def busy(self) -> None:
        self._body()
        self._send(503, b"")

    monkeypatch.setattr(store_probe, "SECONDS", 0.3)
    monkeypatch.setattr(fake_gcs.Handler, "do_POST", busy)
    with pytest.raises(UserError, match=r"cannot write there: it got no answer within 0 s, though obstore did"):
        store_probe.check_access(f"{gs}/runs")


def test_the_backend_that_orbax_is_told_to_use_is_the_one_that_is_tried(monkeypatch):
    place = stores.parse_url("gs://bucket/runs")
    assert stores.kvstore_spec(place)["driver"] == "gcs"
    monkeypatch.setenv("TENSORSTORE_GCS_BACKEND", "gcs_grpc")
    assert stores.kvstore_spec(place)["driver"] == "gcs_grpc"
