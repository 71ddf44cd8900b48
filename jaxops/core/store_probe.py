"""A trial of an object store before a run begins: every operation of a run, with the very libraries that it will use.

Tested in tests/core/test_store_probe.py and test_stores.py.
"""

import contextlib
import dataclasses
import os

from jaxops.core.failures import UserError
from jaxops.core.stores import Denied, Location, Store, StoreError, advice, brief, kvstore_spec, open_store, parse_url

SECONDS = 10.0
"""The time that one request of tensorstore may take; by itself it would retry for a very long time."""


def check_access(url: str | os.PathLike[str], *, write: bool = True) -> None:
    """Tries within seconds all that a run does in a store: list, write, delete, and save with tensorstore.

    Raises:
      UserError: a package, the bucket, credentials or a permission is missing, or the store does not answer. The
        message says what to do about it.
    """
    place = parse_url(url)
    store = open_store(place, patient=False)
    probe = f"{place.key}/.probe-{os.getpid()}".lstrip("/")
    try:
        next(store.entries(place.key), None)
        if write:
            store.write(probe, b"jaxops")
            store.delete([probe])
            _save_with_tensorstore(store, dataclasses.replace(place, key=f"{probe}-arrays/"))
    except OSError as error:
        raise UserError(f"{place}: {advice(place, error)}") from None


def _save_with_tensorstore(store: Store, folder: Location) -> None:
    """Writes, reads and deletes a tiny database with tensorstore, which saves the arrays.

    Tensorstore finds credentials and endpoints by itself, and writes one object on the condition that nobody else did.
    So the success of another library's write says nothing of it. Where it fails, `store` removes what it wrote.

    Raises:
      StoreError: tensorstore was refused, or got no answer in time.
    """
    import tensorstore

    spec, what = kvstore_spec(folder), "open"
    try:
        plain = tensorstore.KvStore.open(spec).result(timeout=SECONDS)
        database = tensorstore.KvStore.open({"driver": "ocdbt", "base": spec}).result(timeout=SECONDS)
        what = "write"
        database.write("probe", b"jaxops").result(timeout=SECONDS)
        what = "read"
        if plain.read("manifest.ocdbt").result(timeout=SECONDS).state != "value":
            raise FileNotFoundError("what it wrote is not there")
        what = "delete"
        plain.delete_range(tensorstore.KvStore.KeyRange()).result(timeout=SECONDS)
    except Exception as error:
        with contextlib.suppress(OSError):
            store.delete([entry.key for entry in store.entries(folder.key)])
        told = f"tensorstore, which saves the arrays, cannot {what} there"
        if isinstance(error, TimeoutError):
            raise StoreError(f"{told}: it got no answer within {SECONDS:.0f} s, though obstore did") from None
        kind = Denied if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error) else StoreError
        raise kind(f"{told}: {brief(error)}") from None
