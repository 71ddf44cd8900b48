"""The checksums of the files of a data cache: the CRC-32 of every block, checked whole or by a random sample.

A small file is read whole whenever the cache is opened. A large one would delay every start, so that a few blocks are
read, other ones each time. Tested in tests/data/interactions/test_cache_checks.py.
"""

import hashlib
import os
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxops.core.checksums import side_by_side

BLOCK = 1 << 22
"""Bytes with a checksum of their own."""
WHOLE = 1 << 26
"""Files of at most so many bytes are read whole at every opening."""
SAMPLE = 16
"""The number of blocks that are read of larger ones."""


def describe(path: Path) -> dict[str, Any]:
    """Returns the size of a file and the CRC-32 of each of its blocks, reading all of it."""
    size = path.stat().st_size
    crcs = side_by_side(lambda at: _crc(path, at, BLOCK), range(-(-size // BLOCK)))
    return {"bytes": size, "block": BLOCK, "crc32": crcs}


def problem(path: Path, expected: Mapping[str, Any], *, whole: bool) -> str | None:
    """Returns what is wrong with a file, or None.

    Args:
      path: the file.
      expected: what `describe` returned when it was written; older caches have `bytes` and `sha256` of the whole file.
      whole: read all of it, whatever its size.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            return f"{path.name}: no ordinary file"
        if size != expected["bytes"]:
            return f"{path.name}: {size:,} bytes, expected {expected['bytes']:,}"
        if "crc32" not in expected:
            readable = whole or size <= WHOLE
            return _changed(path, "SHA-256") if readable and _sha256(path) != expected["sha256"] else None
        crcs, block = expected["crc32"], expected["block"]
        picked = list(range(len(crcs)))
        if not whole and size > WHOLE:
            picked = sorted(random.SystemRandom().sample(picked, min(SAMPLE, len(crcs))))
        found = side_by_side(lambda at: _crc(path, at, block), picked)
    except FileNotFoundError:
        return f"{path.name}: missing"
    except OSError as error:
        return f"{path.name}: cannot be read ({os.strerror(error.errno) if error.errno else error})"
    wrong = [at for at, crc in zip(picked, found, strict=True) if crc != crcs[at]]
    if not wrong:
        return None
    where = f"bytes {wrong[0] * block:,} to {min((wrong[0] + 1) * block, size) - 1:,}"
    more = f" and {len(wrong) - 1} more block(s)" if len(wrong) > 1 else ""
    return f"{_changed(path, 'CRC-32')}, {where}{more}"


def is_sampled(expected: Mapping[str, Any]) -> bool:
    """Returns whether an opening reads only a part of this file, or, of an older cache, nothing."""
    return expected["bytes"] > WHOLE


def _changed(path: Path, checksum: str) -> str:
    return f"{path.name}: contents were changed ({checksum} differs)"


def _crc(path: Path, at: int, block: int) -> int:
    with path.open("rb") as file:
        file.seek(at * block)
        return zlib.crc32(file.read(block))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
