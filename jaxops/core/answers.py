"""Answers from the host as a journal keeps them: by sample, with a digest of the question, as lines of JSON.

Tested in tests/core/test_journal.py.
"""

import hashlib
import json
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxops.core.failures import UserError

VERSION = 1
"""The format version of a line; all versions up to this one are read."""


Answer = int | float | None | dict[str, Any]
"""A finite number, None, or a dict of JSON with finite numbers."""


class Key(NamedTuple):
    """The sample of a question.

    Attributes:
      step: step of the loop.
      id: example id.
      copy: number of the completion of the same prompt.
      redraw: number of the redraw.
      turn: turn of the conversation.
    """

    step: int
    id: int
    copy: int = 0
    redraw: int = 0
    turn: int = 0


class KeptAnswer(NamedTuple):
    """An answer, and the digest of the question that it answers."""

    digest: str
    answer: Answer


def digest_of(asked: Any) -> str:
    """Returns the SHA-256 of a question: of bytes as they are, else of canonical JSON (arrays by their contents).

    Raises:
      TypeError: the question holds a value that is neither JSON nor an array.
    """
    if isinstance(asked, bytes):
        return hashlib.sha256(b"bytes\n" + asked).hexdigest()
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(b"json\n" + text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | jax.Array):
        array = np.ascontiguousarray(value)
        return {"dtype": str(array.dtype), "shape": array.shape, "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    raise TypeError(f"{type(value).__name__} is neither JSON nor an array: give its text, or bytes")


def checked_answer(key: object, answer: Any) -> Answer:
    """Returns the answer as JSON reads it back.

    Raises:
      UserError: the answer is not finite, or not a number, None or dict of JSON.
    """
    if isinstance(answer, np.ndarray | jax.Array) and np.ndim(answer) == 0:
        answer = np.asarray(answer)[()]
    if isinstance(answer, np.generic):
        answer = answer.item()
    if not (answer is None or isinstance(answer, int | float | Mapping)):
        raise UserError(
            f"the answer for {key} is {_short(answer)} ({type(answer).__name__}):"
            " expected a finite number, a dict of JSON, or None to drop the sample"
        )
    if isinstance(answer, float) and not math.isfinite(answer):
        raise UserError(f"the answer for {key} is {answer}: an answer must be finite, or None to drop the sample")
    if not isinstance(answer, Mapping):
        return answer
    try:
        return json.loads(json.dumps(dict(answer), allow_nan=False, default=_item))
    except ValueError as error:
        raise UserError(
            f"the answer for {key} is {_short(answer)}: an answer must be finite, or None to drop the sample"
        ) from error
    except TypeError as error:
        raise UserError(f"the answer for {key} is {_short(answer)}, which JSON cannot hold: {error}") from error


def _item(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is no number, text, list or dict")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def whole_key(key: Key) -> Key:
    """Returns a key whose numbers are Python integers, numpy's among them.

    Raises:
      TypeError: one is no integer.
    """
    return Key(*map(operator.index, key))


def line_of(key: Key, entry: KeptAnswer) -> bytes:
    """Returns the line that a journal keeps of an answer."""
    line = {"v": VERSION, "key": list(key), "digest": entry.digest, "answer": entry.answer}
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def entry_of(line: bytes, where: str) -> tuple[Key, KeptAnswer] | None:
    """Parses one line; returns None if it is not a valid entry.

    Raises:
      UserError: the line has a newer format.
    """
    try:
        fields = json.loads(line)
        version = operator.index(fields["v"])
        if version <= VERSION:
            key, digest = whole_key(Key(*fields["key"])), fields["digest"]
            return (key, KeptAnswer(digest, checked_answer(key, fields["answer"]))) if isinstance(digest, str) else None
    except (ValueError, KeyError, TypeError, RecursionError, UserError):
        return None
    raise UserError(
        f"{where}: format {version}, but this version of jaxops reads up to {VERSION}:"
        " resume with the newer jaxops that wrote it"
    )
