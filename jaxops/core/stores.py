"""Access to object stores, s3:// and gs://: whole objects, listings, and error messages with advice.

It uses obstore (`pip install 'jaxops[s3]'` or `[gcs]`), imported on first use. Arrays are read and written by
tensorstore, for which `kvstore_spec` describes the same location. Tested in tests/core/test_stores.py.
"""

import configparser
import dataclasses
import datetime as dt
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.secret_text import has_password, without_passwords

EXTRAS = {"s3": "s3", "gs": "gcs"}
"""Scheme -> the extra of the jaxops package that it needs."""
READ_AHEAD = 16 << 20
"""Bytes per request when an object is read in pieces."""


_REFUSED = re.compile(r"status code: 40[13]\b")
_METADATA = re.compile(
    r"169\.254\.|/computeMetadata/|metadata\.google|oauth2|/latest/(api|meta-data)/|Missing \w+KeyId"
)
"""Pattern of error texts that mean that the environment has no credentials: a metadata service was asked for them."""


class StoreError(OSError, RunFailed):
    """An error of a store that refused or did not answer; the message names the location and the reason."""


class Denied(StoreError, PermissionError):
    """An error for missing permission or missing identification."""


class Changed(StoreError):
    """An error of a conditional write that met another version of the object than it expected."""


class Unconditional(StoreError):
    """An error of a store that does not support conditional writes."""


@dataclasses.dataclass(frozen=True)
class Location:
    """A location `scheme://bucket/key`; the key neither begins nor ends with a slash."""

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One object of a store.

    Attributes:
      key: its key.
      size: its size in bytes.
      changed: time of its last change, in Unix seconds.
      version: the identifiers that a conditional write compares.
    """

    key: str
    size: int
    changed: float
    version: dict[str, str]


def is_url(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a URL of an object store (of any scheme)."""
    return "://" in os.fspath(path)


def parse_url(url: str | os.PathLike[str]) -> Location:
    """Splits a URL into its parts.

    Raises:
      UserError: the scheme is not known, or the URL names no bucket.
    """
    scheme, _, rest = os.fspath(url).partition("://")
    if has_password(os.fspath(url)):
        raise UserError(
            f"{without_passwords(os.fspath(url))}: credentials do not belong into a URL, which is shown and recorded;"
            " set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or GOOGLE_APPLICATION_CREDENTIALS"
        )
    if scheme not in EXTRAS:
        raise UserError(f"{url}: {scheme}:// is not known; object stores are s3://BUCKET/... and gs://BUCKET/...")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise UserError(f"{url}: names no bucket; expected {scheme}://BUCKET/FOLDER")
    return Location(scheme, bucket, "/".join(part for part in key.split("/") if part))


def endpoint(scheme: str) -> str:
    """Returns the endpoint of a store that is not AWS's or Google's, else "".

    It reads AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or AWS's config file, or STORAGE_EMULATOR_HOST.
    """
    if scheme == "gs":
        host = os.environ.get("STORAGE_EMULATOR_HOST", "")
        return host if "://" in host or not host else f"http://{host}"
    found = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return (found or _profile().get("endpoint_url", "")).rstrip("/")


def open_store(place: Location, *, patient: bool = True) -> "Store":
    """Opens the bucket of a location; requests are retried for a minute if `patient`, else for 8 seconds.

    Raises:
      UserError: the package that it needs is not installed, or a setting in the environment is invalid.
    """
    try:
        import obstore  # noqa: F401
    except ImportError:
        extra = EXTRAS[place.scheme]
        raise UserError(
            f"{place.scheme}:// needs a package that is not installed: pip install 'jaxops[{extra}]'"
        ) from None
    settings = _s3_settings() if place.scheme == "s3" else _gs_settings()
    return _opened(place.scheme, place.bucket, tuple(sorted(settings.items())), patient)


class Store:
    """One bucket of a store.

    Every method raises an OSError (FileNotFoundError, `Denied` or `StoreError`) whose message can be shown to users.
    """

    def __init__(self, scheme: str, bucket: str, inner: Any) -> None:
        self.scheme, self.bucket, self._inner = scheme, bucket, inner

    def read(self, key: str) -> bytes:
        """Reads the whole object."""
        with self._told("read", key):
            return bytes(self._inner.get(key).bytes())

    def open(self, key: str) -> IO[bytes]:
        """Opens the object as a binary file for reading, READ_AHEAD bytes at a time."""
        import obstore

        with self._told("read", key):
            return _Reader(self, key, obstore.open_reader(self._inner, key, buffer_size=READ_AHEAD))  # type: ignore[return-value]

    def write(self, key: str, data: bytes | Path, *, only_if: dict[str, str] | None = None) -> dict[str, str]:
        """Writes the object atomically, and returns its version.

        Args:
          key: key of the object.
          data: its bytes, or a local file.
          only_if: `{}` to write only a new object, or the version that the existing object must still have.

        Raises:
          Changed: the condition `only_if` did not hold.
          Unconditional: `only_if` was given and the store does not support conditional writes.
        """
        mode: Any = None if only_if is None else only_if or "create"
        try:
            with self._told("write", key):
                return _version(self._inner.put(key, data, mode=mode))
        except StoreError as error:
            if only_if is not None and re.search(r"\b501\b|NotImplemented|not implemented|not supported", str(error)):
                raise Unconditional(str(error)) from None
            raise

    def head(self, key: str) -> Entry | None:
        """Returns size, time and version of an object, or None if it does not exist."""
        try:
            with self._told("look at", key):
                return _entry(self._inner.head(key))
        except FileNotFoundError:
            return None

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yields every object below a folder, from one listing."""
        with self._told("list", folder):
            for page in self._inner.list(folder or None):
                yield from map(_entry, page)

    def children(self, folder: str) -> tuple[list[str], list[Entry]]:
        """Returns the names of the folders directly in a folder, and the objects directly in it."""
        with self._told("list", folder):
            found = self._inner.list_with_delimiter(folder or None)
            names = [str(prefix).rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]]
            return names, [_entry(one) for one in found["objects"]]

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects; an object that does not exist counts as deleted."""
        keys = list(keys)
        if keys:
            with self._told("delete", keys[0]):
                try:
                    self._inner.delete(keys)
                except FileNotFoundError:  # gs:// raises for an object that does not exist, s3:// does not
                    for key in keys if len(keys) > 1 else ():
                        self.delete([key])

    @contextmanager
    def _told(self, what: str, key: str) -> Iterator[None]:
        """Turns obstore's errors inside the context into OSErrors with a message of one line."""
        from obstore import exceptions as of

        place = Location(self.scheme, self.bucket, key)
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise StoreError(self._no_bucket()) from None
            raise FileNotFoundError(f"{place}: not there") from None
        except (of.AlreadyExistsError, of.PreconditionError) as error:
            raise Changed(f"cannot {what} {place}: {brief(error)}") from None
        except (of.PermissionDeniedError, of.UnauthenticatedError) as error:
            raise Denied(f"may not {what} {place}: {brief(error)}") from None
        except (of.BaseError, ValueError) as error:
            if "NoSuchBucket" in str(error):
                raise StoreError(self._no_bucket()) from None
            if _REFUSED.search(str(error)) and not _METADATA.search(str(error)):  # listings raise no class of their own
                raise Denied(f"may not {what} {place}: {brief(error)}") from None
            raise StoreError(f"cannot {what} {place}: {brief(error)}") from None

    def _no_bucket(self) -> str:
        at = without_passwords(endpoint(self.scheme))
        return f"there is no bucket {self.bucket!r}" + (f" at {at}" if at else f" ({self.scheme}://{self.bucket})")


def kvstore_spec(place: Location) -> dict[str, Any]:
    """Returns the tensorstore spec of a location, with the endpoint, region and credentials of the environment."""
    if place.scheme == "gs":
        driver = os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs")  # which orbax reads too
        return {"driver": driver, "bucket": place.bucket, "path": place.key}
    settings = _s3_settings()
    spec: dict[str, Any] = {"driver": "s3", "bucket": place.bucket, "path": place.key}
    if "endpoint" in settings:
        spec["endpoint"] = settings["endpoint"]
    if "region" in settings:
        spec["aws_region"] = settings["region"]
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # the default chain would try other sources first, and log about them
        spec["aws_credentials"] = {"type": "environment"}
    elif "aws_access_key_id" in _profile():  # the default chain does not look at AWS_PROFILE
        config, credentials = (str(path if path.exists() else os.devnull) for _, path in _aws_files())
        files = {"config_file": config, "credentials_file": credentials}  # tensorstore takes both or neither
        spec["aws_credentials"] = {"type": "profile", "profile": _profile_name(), **files}
    return spec


@functools.cache
def _opened(scheme: str, bucket: str, settings: tuple[tuple[str, Any], ...], patient: bool) -> Store:
    from obstore.store import GCSStore, S3Store

    seconds = dt.timedelta(seconds=60 if patient else 8)
    client = {"connect_timeout": "5s", "timeout": "60s" if patient else "8s", "allow_http": True}
    retry = {"max_retries": 10 if patient else 2, "retry_timeout": seconds}
    make: Any = S3Store if scheme == "s3" else GCSStore
    try:
        inner = make(bucket, config=dict(settings), client_options=client, retry_config=retry)
    except Exception as error:  # such as a broken GOOGLE_APPLICATION_CREDENTIALS
        place = Location(scheme, bucket, "")
        raise UserError(f"{place}: {advice(place, StoreError(brief(error)))}") from None
    return Store(scheme, bucket, inner)


def _s3_settings() -> dict[str, Any]:
    profile, env = _profile(), os.environ
    found: dict[str, Any] = {"region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or profile.get("region")}
    if at := endpoint("s3"):
        found |= {"endpoint": at, "region": found["region"] or "us-east-1"}
    if not env.get("AWS_ACCESS_KEY_ID") and "aws_access_key_id" in profile:
        found |= {
            "access_key_id": profile["aws_access_key_id"],
            "secret_access_key": profile.get("aws_secret_access_key"),
            "session_token": profile.get("aws_session_token"),
        }
    elif env.get("AWS_ACCESS_KEY_ID"):
        names = ("access_key_id", "secret_access_key", "session_token")
        found |= {name: env.get(f"AWS_{name.upper()}") for name in names}
    return {name: value for name, value in found.items() if value}


def _gs_settings() -> dict[str, Any]:
    at = endpoint("gs")
    if not at:
        return {}
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", at)
    os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # else tensorstore searches for credentials
    # obstore's skip_signature would still ask for a token before a write
    anybody = {"gcs_base_url": at, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    return {"service_account_key": json.dumps(anybody)}


def _profile() -> Mapping[str, str]:
    """Reads keys, region and endpoint of AWS_PROFILE from AWS's two files, neither of which obstore reads."""
    found: dict[str, str] = {}
    for section, path in _aws_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        if parser.has_section(section):
            found |= {key: value.strip() for key, value in parser.items(section)}
    return found


def _profile_name() -> str:
    return os.environ.get("AWS_PROFILE") or "default"


def _aws_files() -> list[tuple[str, Path]]:
    """Returns AWS's two files, config and credentials, each after the name of the profile's section in it."""
    name = _profile_name()
    config = os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"
    credentials = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    section = name if name == "default" else f"profile {name}"
    return [(section, Path(os.path.expanduser(config))), (name, Path(os.path.expanduser(credentials)))]


def advice(place: Location, error: OSError) -> str:
    """Returns the message of a failed check, with advice on what to do about it."""
    text, at = without_passwords(str(error)), without_passwords(endpoint(place.scheme))
    if "there is no bucket" in text:
        return f"{text}; create it, or set run.dir"
    if not isinstance(error, Denied) and _METADATA.search(text):
        how = {
            "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for a profile that has keys",
            "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
        }[place.scheme]
        return f"no credentials were found, and this machine has no role of its own; {how} ({text})"
    if isinstance(error, Denied):
        return f"{text}; reading, writing, listing and deleting must be allowed there"
    if "redirect" in text.lower() or "PermanentRedirect" in text:
        return f"the bucket is in another region: set AWS_REGION ({text})"
    if "error sending request" in text or "timed out" in text or "dns" in text.lower():
        variable = "AWS_ENDPOINT_URL" if place.scheme == "s3" else "STORAGE_EMULATOR_HOST"
        return f"{at or 'the store'} does not answer; check {f'{variable} and ' if at else ''}the network ({text})"
    return text


def _entry(meta: Mapping[str, Any]) -> Entry:
    return Entry(str(meta["path"]), int(meta["size"]), meta["last_modified"].timestamp(), _version(meta))


def _version(meta: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(meta[name]) for name in ("e_tag", "version") if meta.get(name)}


def brief(error: BaseException) -> str:
    """Returns the reason in an error text of obstore or tensorstore without debug output, S3's own message first."""
    text = str(error).partition("\n\nDebug source")[0]
    reason = ""
    if found := re.search(r"<Code>(.*?)</Code>", text):
        said = re.search(r"<Message>(.*?)</Message>", text)
        reason = found[1] + (f": {said[1]}" if said else "")
    request = re.search(r"Error performing (\w+ \S+?)(?:\?\S*)? in [\d.]+\S*?s\b(.*)", text, re.DOTALL)
    if request:
        rest = re.sub(r"\s*(, after .*?retry_timeout: \S+)?\s*- ", "", request[2].partition("<?xml")[0], count=1)
        text = f"{rest.strip().rstrip(':')} ({request[1]})"
    text = re.sub(r"Server returned non-2xx status code: (.*?)(: *<.*>)?", r"\1", text, flags=re.DOTALL)
    text = " ".join(f"{reason} {re.sub(r': *<.*>', '', text, flags=re.DOTALL)}".split())
    return without_passwords(text)[:400] or type(error).__name__


class _Reader:
    """A wrapper of obstore's reader that is a context manager, returns bytes and raises this module's errors."""

    def __init__(self, store: Store, key: str, inner: Any) -> None:
        self._store, self._key, self._inner = store, key, inner

    def read(self, size: int = -1) -> bytes:
        with self._store._told("read", self._key):
            return bytes(self._inner.read(None if size is None or size < 0 else size))

    def close(self) -> None:
        self._inner.close()

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
