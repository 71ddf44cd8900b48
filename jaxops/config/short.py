"""The short `repr` of a configuration: what differs from the defaults, as the Python that would make it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxops.config.secrets import Secret
from jaxops.config.shapes import ABSENT


def short_repr(value: Any) -> str:
    """Returns `AdamW(lr=0.002)`: of dataclasses the fields that differ from their defaults, at every depth.

    A class may name fields in `always_shown` that are shown in any case.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Secret):
        fields = (f"{name}={short_repr(entry)}" for name, entry in _changed(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    if type(value) is list:
        return f"[{', '.join(map(short_repr, value))}]"
    if type(value) is tuple:
        return f"({', '.join(map(short_repr, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {short_repr(entry)}" for key, entry in value.items()) + "}"
    return repr(value)


def _changed(instance: Any) -> Iterator[tuple[str, Any]]:
    shown = getattr(type(instance), "always_shown", ())
    for field in dataclasses.fields(instance):
        value, default = getattr(instance, field.name), _default(field)
        same = type(value) is type(default) and value == default
        if field.init and field.repr and (field.name in shown or not same):
            yield field.name, value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ABSENT if field.default is dataclasses.MISSING else field.default
