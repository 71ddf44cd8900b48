"""Remarks on data that a person should see: printed on stderr (logger `jaxops.data`) and kept for `data inspect`."""

import contextlib
import contextvars
import logging
from collections.abc import Iterator

LOGGER = logging.getLogger("jaxops.data")
_kept: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("jaxops_data_notes", default=None)

_quiet: contextvars.ContextVar[bool] = contextvars.ContextVar("jaxops_data_quiet", default=False)


def tell(text: str) -> None:
    """Prints a remark and keeps it for the enclosing `collected`, where it is kept and printed once."""
    kept = _kept.get()
    if kept is not None:
        if text in kept:
            return
        kept.append(text)
    if not _quiet.get():
        LOGGER.warning("data: %s", text)


@contextlib.contextmanager
def collected(quiet: bool = False) -> Iterator[list[str]]:
    """Gives the list of the remarks that are made inside the block, in order, each once; `quiet` prints none."""
    notes: list[str] = []
    token, silence = _kept.set(notes), _quiet.set(quiet or _quiet.get())
    try:
        yield notes
    finally:
        _kept.reset(token)
        _quiet.reset(silence)
