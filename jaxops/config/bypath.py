"""A user's own code is imported by path; its signature is checked when the configuration is loaded."""

import dataclasses
import functools
import importlib
import inspect
import keyword
import os
import pkgutil
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from jaxops.config.errors import unknown
from jaxops.config.part import Part
from jaxops.config.secrets import revealed, secrets_in
from jaxops.core.failures import UserError, nearest

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclasses.dataclass(frozen=True)
class Factory:
    """A marker for `Annotated[...]` that says how the callable behind a `ByPath` is called.

    Attributes:
      leading: number of positional arguments before the user's keywords.
      note: what the callable must be, for the error message ("a factory, called once as fn(model, ...)").
      open: whether keywords that the configuration does not hold may come with the call, such as columns of data.
    """

    leading: int = 1
    note: str = ""
    open: bool = False


class Guard(Protocol):
    """Decides what a config that came with a run folder may have imported, and which secrets it may read."""

    def imports(self, path: str) -> None:
        """Lets `package.module:name` pass.

        Raises:
          UserError: it may not be imported.
        """
        ...

    def secrets(self, names: Sequence[str]) -> None:
        """Lets these secrets be read.

        Raises:
          UserError: they may not be.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ByPath(Part):
    """A user's own callable: `{fn: "pkg.mod:name", gamma: 2}`, or `pkg.mod:name` alone.

    `kwargs` holds Python names (`lambda_` for the key `lambda`) and must not be changed. A config out of a run folder
    has a `guard`, which is asked before anything is imported or called.
    """

    fn: str
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guard: Guard | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def kind(self) -> str:
        """The import path, which messages show in the place of a built-in choice's kind."""
        return self.fn

    def resolve(self) -> Any:
        """Imports the object that `fn` names; the current folder is searched first, as for `python -m`.

        Raises:
          UserError: no such module or attribute (with the nearest names), the import itself fails, or the guard has
            it not.
        """
        if not IMPORT_PATH.fullmatch(self.fn):
            raise UserError(f"expected an import path 'package.module:name', got {self.fn!r}")
        module_name, _, attributes = self.fn.partition(":")
        if self.guard is not None:
            self.guard.imports(self.fn)
        found = _import(module_name)
        for name in attributes.split("."):
            if not hasattr(found, name):
                where = getattr(found, "__name__", module_name)
                known = [known for known in dir(found) if not known.startswith("_")]
                raise UserError(f"{where!r} has no {name!r}{nearest(name, known)}")
            found = getattr(found, name)
            if self.guard is not None and (elsewhere := _home(found)) is not None:
                self.guard.imports(elsewhere)  # `trusted.losses:os.system` is no path of trusted
        return found

    def call(self, *leading: Any) -> Any:
        """Calls the callable with these positional arguments and the keywords of the configuration."""
        return self.bound()(*leading)

    def bound(self) -> Callable[..., Any]:
        """Returns the callable with the keywords of the configuration bound to it, to be called many times.

        Raises:
          UserError: see `resolve`; the guard refuses a secret, or it is not set.
        """
        if self.guard is not None and (names := list(secrets_in(self.kwargs))):
            self.guard.secrets(names)
        found = self.resolve()
        return functools.partial(found, **revealed(self.kwargs))

    def check(self, leading: int = 1, note: str = "") -> None:
        """Checks the callable's signature against `leading` positional arguments and the keywords.

        Raises:
          UserError: it cannot be imported or called like that; one message holds all complaints.
        """
        complaints = [
            message if key == "fn" else f"{key}: {message}" for key, message in self.complaints(Factory(leading, note))
        ]
        if complaints:
            raise UserError(f"{self.fn}: " + "; ".join(complaints))

    def complaints(self, factory: Factory) -> Iterator[tuple[str, str]]:
        """Yields all reasons why it cannot be called as `factory` says, as (key in the mapping, message)."""
        try:
            found = self.resolve()
        except UserError as error:
            yield "fn", str(error)
            return
        if not callable(found):
            yield "fn", f"{self.fn!r} is not callable but {type(found).__name__}{_noted(factory.note)}"
            return
        yield from _signature_complaints(found, self.kwargs, factory)


def spelled(name: str) -> str:
    """Returns the name in YAML: words that Python reserves (`global_`, `lambda_`, `in_`) lose their underscore."""
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


def python_name(name: str) -> str:
    """Returns the Python name of a key in YAML, the inverse of `spelled`."""
    return f"{name}_" if keyword.iskeyword(name) else name


def _home(found: Any) -> str | None:
    """The import path of a module, function or class where it was defined; None for any other value."""
    if isinstance(found, types.ModuleType):
        return found.__name__
    if isinstance(found, type | types.FunctionType | types.BuiltinFunctionType) and found.__module__:
        return f"{found.__module__}:{found.__qualname__}"
    return None


def _noted(note: str) -> str:
    return f" ({note})" if note else ""


def _signature_complaints(
    found: Callable[..., Any], kwargs: Mapping[str, Any], factory: Factory
) -> Iterator[tuple[str, str]]:
    leading, note = factory.leading, factory.note
    try:
        parameters = list(inspect.signature(found).parameters.values())
    except (ValueError, TypeError):  # some builtins have no signature
        return
    name = getattr(found, "__name__", type(found).__name__)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < leading and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        yield (
            "fn",
            f"{name} is called with {leading} positional, it takes {len(positional)}{_noted(note)}",
        )
        return
    taken = {p.name for p in positional[:leading]}
    free = {
        p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in taken
    }
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in kwargs:
            if key not in free:
                known = [spelled(known) for known in free]
                yield spelled(key), unknown(f"{name} takes no such keyword", spelled(key), known)
    required = [p.name for p in parameters if p.default is p.empty and p.name in free and not factory.open]
    required += [p.name for p in positional[leading:] if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    missing = [repr(spelled(name_)) for name_ in required if name_ not in kwargs]
    if missing:
        yield "fn", f"{name} cannot be called without {', '.join(missing)}{_noted(note)}"


def _import(name: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            _not_found(error.name)
        _failed(name, error)
    except Exception as error:
        _failed(name, error)


def _not_found(name: str) -> NoReturn:
    parent, _, last = name.rpartition(".")
    folders = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    if parent and folders is None:
        raise UserError(f"no module {name!r}: {parent!r} is a module, not a package")
    hint = nearest(last, {module.name for module in pkgutil.iter_modules(folders)})
    where = f"in {parent!r}" if parent else "in the current folder or among the installed packages"
    raise UserError(f"no module {last!r} {where}{hint}")


def _failed(name: str, error: Exception) -> NoReturn:
    """Reports a failure of the user's code while it is imported: the user's own line, without importlib's traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    theirs = [frame for frame in frames if frame.filename != __file__]
    line = f" ({os.path.relpath(theirs[-1].filename)}:{theirs[-1].lineno})" if theirs else ""
    if isinstance(error, SyntaxError) and error.filename:
        line = f" ({os.path.relpath(error.filename)}:{error.lineno})"
    message = error.msg if isinstance(error, SyntaxError) else error
    raise UserError(f"importing {name!r} failed: {type(error).__name__}: {message}{line}") from error
