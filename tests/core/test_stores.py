"""Object stores against a local S3 server: what is there, what is refused and in which words, and orbax on s3://."""

import json
import os

import jax
import numpy as np
import pytest
from object_stores import free_port, gs, needs_moto, objects, s3  # noqa: F401 (fixtures)

from jaxops.core import store_paths, store_probe, stores
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.stores import Changed, StoreError

pytestmark = needs_moto


def test_the_parts_of_a_url():
    assert stores.parse_url("s3://bucket/a/b/") == stores.Location("s3", "bucket", "a/b")
    assert (
        str(stores.parse_url("gs://bucket//a")) == "gs://bucket/a"
        and str(stores.parse_url("gs://bucket")) == "gs://bucket"
    )
    for url, said in [
        ("s4://bucket/a", r"s4:// is not known; object stores are s3://BUCKET/... and gs://BUCKET/..."),
        ("s3:///a", r"names no bucket; expected s3://BUCKET/FOLDER"),
    ]:
        with pytest.raises(UserError) as caught:
            stores.parse_url(url)
        assert said in str(caught.value)


def test_objects_are_written_whole_and_on_condition(s3):  # noqa: F811
    store = stores.open_store(stores.parse_url(s3))
    first = store.write("a/b", b"one", only_if={})
    with pytest.raises(Changed):
        store.write("a/b", b"two", only_if={})
    with pytest.raises(Changed):
        store.write("a/b", b"two", only_if={"e_tag": '"other"'})
    store.write("a/b", b"two", only_if=first)
    entry = store.head("a/b")
    assert (entry.key, entry.size, store.read("a/b"), store.head("a")) == ("a/b", 3, b"two", None)
    with store.open("a/b") as file:
        assert (file.read(1), file.read()) == (b"t", b"wo")
    store.write("a/c/d", b"")
    assert store.children("a") == (["c"], [entry])
    assert [entry.key for entry in store.entries("a")] == ["a/b", "a/c/d"]
    store.delete(["a/b", "a/nothing"])
    with pytest.raises(FileNotFoundError, match=f"{s3}/a/b: not there"):
        store.read("a/b")


def test_paths_behave_like_folders(s3):  # noqa: F811
    folder = store_paths.path(f"{s3}/runs/x")
    assert not folder.exists() and not folder.is_dir()
    (folder / "a" / "b.txt").write_text("grün")
    (folder / "c").write_bytes(b"12")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c"]
    assert folder.is_dir() and not folder.is_file() and (folder / "c").is_file()
    assert (folder / "a" / "b.txt").read_text() == "grün" and (folder / "c").stat().length == 2
    assert (folder / "c").stat().mtime > 1.7e9 and (folder / "a").stat().is_directory
    assert folder.files() == {"a/b.txt": 5, "c": 2}
    assert [str(path) for path in folder.glob("*/*.txt")] == [f"{s3}/runs/x/a/b.txt"]
    with pytest.raises(ZeroDivisionError), (folder / "torn").open("w") as file:
        file.write("half")
        1 / 0  # noqa: B018
    assert not (folder / "torn").exists()
    with pytest.raises(FileExistsError):
        folder.mkdir()
    (folder / "c").unlink()
    folder.rmtree()
    folder.rmtree(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        folder.rmtree()


def test_what_is_usable_passes_and_leaves_nothing(s3):  # noqa: F811
    store_probe.check_access(f"{s3}/runs/x")
    assert objects(s3) == set()


def test_a_missing_bucket_is_named(s3):  # noqa: F811
    with pytest.raises(UserError, match=r"there is no bucket 'no-such-bucket' at http://.*create it, or set run.dir"):
        store_probe.check_access("s3://no-such-bucket/runs")


@pytest.mark.parametrize("missing", [["AWS_ACCESS_KEY_ID"], ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]])
def test_missing_credentials_are_named(s3, monkeypatch, missing):  # noqa: F811
    for name in missing:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")  # as on no cloud machine
    with pytest.raises(UserError, match=r"no credentials were found.*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        store_probe.check_access(f"{s3}/runs")


@pytest.mark.parametrize("profile", ["mine", "default"])
@pytest.mark.parametrize("file", ["credentials", "config"])
def test_a_profile_has_keys_and_an_endpoint(s3, monkeypatch, tmp_path, profile, file):  # noqa: F811
    keys = "aws_access_key_id = a\naws_secret_access_key = b\n"
    section = profile if profile == "default" else f"profile {profile}"
    if file == "credentials":  # the other file is not there
        (tmp_path / "credentials").write_text(f"[{profile}]\n{keys}")
    else:
        (tmp_path / "config").write_text(f"[{section}]\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n{keys}")
        monkeypatch.delenv("AWS_ENDPOINT_URL")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    if profile != "default":
        monkeypatch.setenv("AWS_PROFILE", profile)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    store_probe.check_access(f"{s3}/runs")  # by tensorstore too, which reads the files by itself
    assert objects(s3) == set()


def test_an_endpoint_that_does_not_answer_is_named(s3, monkeypatch):  # noqa: F811
    at = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", at)
    with pytest.raises(UserError, match=f"{at} does not answer; check AWS_ENDPOINT_URL and the network"):
        store_probe.check_access(f"{s3}/runs")


@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
def test_a_missing_permission_is_named(s3, monkeypatch, method, refusing):  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", refusing(method))
    what = {"PUT": "write", "GET": "list", "DELETE": "delete"}[method]
    with pytest.raises(UserError, match=f"may not {what} .*AccessDenied.*must be allowed there"):
        store_probe.check_access(f"{s3}/runs")


@pytest.fixture
def refusing():
    """A server that answers every request well, but those of one method with AccessDenied."""
    import http.server
    import threading

    servers = []

    def start(method: str) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                deletes = self.command == "POST" and "delete" in self.path  # how S3 deletes several
                no = self.command == method or (method == "DELETE" and deletes)
                body = b"<ListBucketResult><Name>b</Name><KeyCount>0</KeyCount></ListBucketResult>"
                if no:
                    body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
                found = self.command != "GET" or "list-type" in self.path
                self.send_response(403 if no else 200 if found else 404)
                self.send_header("etag", '"1"')
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if self.command != "HEAD" else b"")

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def log_message(self, *args):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_without_the_package_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(UserError, match=r"gs:// needs a package that is not installed: pip install 'jaxops\[gcs\]'"):
        store_probe.check_access("gs://bucket/runs")


def tree(scale: float) -> dict:
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    rows = jax.device_put(
        np.arange(64.0, dtype=np.float32).reshape(16, 4) * scale, jax.NamedSharding(mesh, jax.P("fsdp"))
    )
    return {"params": {"table": rows, "bias": np.float32([scale, 2])}, "step": np.int32(3)}


def like(state: dict) -> dict:
    spec = lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=getattr(x, "sharding", None))
    return jax.tree.map(spec, state)


def test_checkpoints_come_back_and_retire(s3):  # noqa: F811
    folder = f"{s3}/run/checkpoints"
    calls: list[str] = []
    with Checkpoints(folder, keep=2, before_commit=lambda: calls.append("pushed")) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3, 2):
            checkpoints.save(step, tree(step), {"cursor": step})
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.latest_good(print)) == ([2, 3], 2, 2)
        assert checkpoints.verify(2) == [] and checkpoints.meta(3) == {"cursor": 3}
        restored = checkpoints.restore(3, like(tree(3)))
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, tree(3)))
    assert restored["params"]["table"].sharding.spec == jax.P("fsdp")
    assert calls == ["pushed"] * 4
    assert {name.split("/")[0] for name in objects(folder)} == {"2-2", "3"}


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_checkpoint_of_a_store_is_one_of_a_folder(s3, tmp_path):  # noqa: F811
    """Copied down, it is read by orbax without jaxops."""
    from orbax.checkpoint import v1

    with Checkpoints(f"{s3}/run") as checkpoints:
        checkpoints.save(1, tree(5), {})
    remote = store_paths.path(f"{s3}/run/1")
    for name in remote.files():
        (tmp_path / "1" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "1" / name).write_bytes((remote / name).read_bytes())
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.verify(1) == []
    found = v1.load(tmp_path / "1", checkpointable_name="state")
    np.testing.assert_array_equal(found["params"]["table"], tree(5)["params"]["table"])


def test_a_flipped_byte_and_a_cut_object_are_found(s3):  # noqa: F811
    with Checkpoints(f"{s3}/run") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step), {})
        checkpoints.wait()
        for step, change in (
            (3, lambda data: data[:-1]),
            (2, lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:]),
        ):
            remote = store_paths.path(f"{s3}/run/{step}")
            name = max(remote.files(), key=lambda name: remote.files()[name] * name.startswith("state/"))
            (remote / name).write_bytes(change((remote / name).read_bytes()))
        said: list[str] = []
        assert checkpoints.latest_good(said.append) == 1
        assert "bytes, expected" in said[0] and f"{s3}/run/3" in said[0] and "CRC-32 differs" in said[1]
        assert checkpoints.verify(2)[0].endswith("contents were changed (CRC-32 differs)")
        with pytest.raises(UserError, match="is damaged"):
            checkpoints.restore(3, like(tree(3)))


def test_a_store_that_does_not_answer_damages_nothing(s3, monkeypatch):  # noqa: F811
    """Else a resume would pass over good checkpoints."""
    with Checkpoints(f"{s3}/run") as checkpoints:
        checkpoints.save(1, tree(1), {}, wait=True)
        silent = StoreError("no answer")
        monkeypatch.setattr(stores.Store, "read", lambda self, key: (_ for _ in ()).throw(silent))
        with pytest.raises(RunFailed, match="no answer"):
            checkpoints.latest_good(print)


def test_an_upload_that_fails_fails_the_save(s3):  # noqa: F811
    def refuse() -> None:
        raise StoreError("no room")

    with Checkpoints(f"{s3}/run", before_commit=refuse) as checkpoints:
        checkpoints.save(1, tree(1), {})
        with pytest.raises(RunFailed, match=f"saving {s3}/run/1 failed: StoreError: no room"):
            checkpoints.wait()
        assert checkpoints.steps() == []
    assert "jaxops.json" not in json.dumps(sorted(objects(s3)))


def test_the_same_in_googles_store(gs):  # noqa: F811
    store_probe.check_access(f"{gs}/run")
    assert objects(gs) == set()
    with pytest.raises(UserError, match="there is no bucket 'other' at http://"):
        store_probe.check_access("gs://other/run")
    store = stores.open_store(stores.parse_url(gs))
    first = store.write("a/b", b"one", only_if={})
    for version in ({}, {"version": "99"}):
        with pytest.raises(Changed):
            store.write("a/b", b"two", only_if=version)
    store.write("a/b", b"two", only_if=first)
    assert store.read("a/b") == b"two" and store.head("a/c") is None and store.children("") == (["a"], [])
    store.delete(["a/b", "a/nothing"])
    with Checkpoints(f"{gs}/run/checkpoints", keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree(step), {"cursor": step})
        restored = checkpoints.restore(2, like(tree(2)))
        assert checkpoints.verify(2) == [] and checkpoints.steps() == [2]
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, tree(2)))
