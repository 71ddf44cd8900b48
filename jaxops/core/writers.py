"""Metric writers: `metrics.jsonl`, TensorBoard, W&B, or any object with `write(step, values)`.

The records of a resumed run equal those of an uninterrupted one: records after the step that it resumes from are
dropped first. Every write either reaches the file or raises `RunFailed`; nothing fails silently on a thread.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Writer(Protocol):
    """Receives scalars at a step.

    `close()`, `flush()`, `event(step, event, text)`, `samples(step, samples)` and `picture(step, name, png)` are called
    where they exist.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars of a step by name."""
        ...


class Writers:
    """A group of writers that is used as one."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands scalars to every writer."""
        for writer in self._writers:
            writer.write(step, values)

    def event(self, step: int, event: str, text: str) -> None:
        """Hands an event to every writer that takes events."""
        for method in self._optional("event"):
            method(step, event, text)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Hands samples of a model's text to every writer that takes samples."""
        for method in self._optional("samples"):
            method(step, samples)

    @property
    def take_pictures(self) -> bool:
        """True where one of the writers takes pictures, so that drawing them is worth its time."""
        return any(self._optional("picture"))

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Hands a picture, the bytes of a PNG file, to every writer that takes pictures."""
        for method in self._optional("picture"):
            method(step, name, png)

    def flush(self) -> None:
        """Hands to the operating system what every writer still holds. It is called before a checkpoint is saved."""
        for method in self._optional("flush"):
            method()

    def close(self) -> None:
        """Closes every writer, then raises the first error."""
        errors = []
        for method in self._optional("close"):
            try:
                method()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _optional(self, name: str) -> Iterator[Any]:
        return (method for writer in self._writers if callable(method := getattr(writer, name, None)))
