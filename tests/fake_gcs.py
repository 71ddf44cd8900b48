"""As much of Google Cloud Storage as jaxops asks for, in memory: no package that imitates it knows both of its APIs.

obstore speaks the XML one (/BUCKET/KEY), tensorstore the JSON one (/storage/v1/b/BUCKET/o/KEY). Written from what
the two send and take, and from the published descriptions of the APIs; the real store was not at hand.
"""

import email.utils
import http.server
import itertools
import json
import threading
import time
import urllib.parse
from typing import Any
from xml.sax.saxutils import escape


class Bucket:
    """Objects of the one bucket: key -> (generation, data, when)."""

    def __init__(self, name: str) -> None:
        self.name, self.objects, self._generations = name, {}, itertools.count(1)
        self.lock = threading.Lock()

    def put(self, key: str, data: bytes, generation: str | None) -> int | None:
        """The new generation; None where the one that must be there (`0`: none) is not."""
        with self.lock:
            if generation is not None and str(self.objects.get(key, (0,))[0]) != generation:
                return None
            self.objects[key] = (next(self._generations), data, time.time())
            return self.objects[key][0]


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; `bucket` is set by `serve`."""

    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def do_GET(self) -> None:
        name, key, query, is_json = self._asked()
        if name != self.bucket.name:
            self._send(404, b"<Error><Code>NoSuchBucket</Code><Message>No such bucket.</Message></Error>")
        elif key is None:
            self._list(query, is_json)
        elif key not in self.bucket.objects:
            self._send(404, b"<Error><Code>NoSuchKey</Code><Message>No such key.</Message></Error>")
        else:
            generation, data, when = self.bucket.objects[key]
            headers = {
                "etag": f'"{generation}"',
                "x-goog-generation": str(generation),
                "last-modified": email.utils.formatdate(when, usegmt=True),
            }
            if str(generation) == query.get("ifGenerationNotMatch"):
                self._send(304, b"")
            elif wanted := self.headers.get("range"):
                start, _, end = wanted.removeprefix("bytes=").partition("-")
                first, last = int(start), min(int(end or len(data) - 1), len(data) - 1)
                headers["content-range"] = f"bytes {first}-{last}/{len(data)}"
                self._send(206, data[first : last + 1], headers)
            else:
                self._send(200, data, headers)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        name, key, query, _ = self._asked()
        data = self._body()
        generation = query.get("ifGenerationMatch") or self.headers.get("x-goog-if-generation-match")
        if name != self.bucket.name:
            self._send(404, b"<Error><Code>NoSuchBucket</Code><Message>No such bucket.</Message></Error>")
            return
        made = self.bucket.put(key or query["name"], data, generation)
        if made is None:
            self._send(412, b"<Error><Code>PreconditionFailed</Code><Message>Precondition Failed</Message></Error>")
            return
        about = {"name": key or query["name"], "generation": str(made), "size": str(len(data)), "bucket": name}
        self._send(200, json.dumps(about).encode(), {"etag": f'"{made}"', "x-goog-generation": str(made)})

    do_POST = do_PUT

    def do_DELETE(self) -> None:
        key = self._asked()[1]
        self._send(204 if self.bucket.objects.pop(key, None) else 404, b"")

    def _asked(self) -> tuple[str, str | None, dict[str, str], bool]:
        """Bucket, key, query, and whether it is the JSON API."""
        path, _, query = self.path.partition("?")
        parts = path.lstrip("/").removeprefix("upload/").split("/")
        is_json = parts[:3] == ["storage", "v1", "b"]
        name, rest = (parts[3], parts[5:]) if is_json else (parts[0], parts[1:])
        key = urllib.parse.unquote("/".join(rest)) or None
        return name, key, dict(urllib.parse.parse_qsl(query)), is_json

    def _list(self, query: dict[str, str], is_json: bool) -> None:
        prefix, keys, folders = query.get("prefix", ""), [], set()
        for key in sorted(self.bucket.objects):
            if key.startswith(prefix):
                head, cut, _ = key[len(prefix) :].partition(query.get("delimiter") or "\0")
                if cut:
                    folders.add(prefix + head + cut)
                else:
                    keys.append(key)
        if is_json:
            self._send(200, json.dumps({"items": [{"name": key} for key in keys]}).encode())
            return
        text = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders))
        for key in keys:
            generation, data, when = self.bucket.objects[key]
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))
            text += f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>&quot;{generation}&quot;</ETag>"
            text += f"<LastModified>{at}</LastModified><Generation>{generation}</Generation></Contents>"
        self._send(200, f"<ListBucketResult>{text}</ListBucketResult>".encode())

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def serve(bucket: str) -> http.server.ThreadingHTTPServer:
    """A server of that bucket in a thread, on a port of its own; stop it with `shutdown` and `server_close`."""
    handler = type("Handler", (Handler,), {"bucket": Bucket(bucket)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server
