"""Tells the user's own runs from others, whose code by import path is imported only where the user trusts it.

A run is one's own if a process of this user has trained it with the very config that lies in its folder: the SHA-256
of that config is kept in the user's state folder, so a folder may be moved or copied, and one that was changed or
came from somebody else is told. What this cannot know: whether the code behind a path is still the same (own_code.py).
Tested in tests/run/test_run_trust.py.
"""

import copy
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.config.dump import digest, flatten_config
from jaxops.core.cache import state_root
from jaxops.core.failures import UserError
from jaxops.data.scratch import folder_beside, sweep

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Trust:
    """Decides for the config of one run folder what may be imported and which secrets are read: a `Guard`.

    Attributes:
      where: the run folder, for messages.
      own: whether the run is the user's own, which may do all that its config says.
      prefixes: import paths, or the beginnings of some, that the user trusts in a run of somebody else.
      named: what the config names by import path, by dotted path.
      used: gets what was imported.
    """

    where: str
    own: bool
    prefixes: tuple[str, ...] = ()
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set, compare=False)

    def imports(self, path: str) -> None:
        """Lets an import path pass.

        Raises:
          UserError: the run is not the user's own and the path is not trusted; lists all that the config names.
        """
        if self.own or self._covers(path):
            self.used.add(path)
            return
        untrusted = {key: name for key, name in self.named.items() if not self._covers(name)}
        if path not in untrusted.values():
            untrusted["(it leads to)"] = path
        listed = "\n".join(f"  {key}: {name}" for key, name in untrusted.items())
        roots = dict.fromkeys(name.partition(":")[0].partition(".")[0] for name in untrusted.values())
        flags = " ".join(f"--trust {root}" for root in roots)
        raise UserError(
            f"{self.where} names code by import path, and nothing says that this run is your own:\n{listed}\n"
            f"None of it was run. Where you trust this code: {flags} (jaxops.load(..., trust=[...])). A run of your own"
            " becomes known when the command that trained it is given again."
        )

    def secrets(self, names: Sequence[str]) -> None:
        """Lets secrets be read.

        Raises:
          UserError: the run is not the user's own.
        """
        if not self.own:
            shown = ", ".join(f"${{secret:{name}}}" for name in dict.fromkeys(names))
            raise UserError(
                f"{self.where} asks for {shown}, and nothing says that this run is your own: secrets are read for your"
                " own configs alone, whatever code is trusted"
            )

    def _covers(self, path: str) -> bool:
        return any(path == prefix or path.startswith((f"{prefix}.", f"{prefix}:")) for prefix in self.prefixes)


def trust_of(values: Mapping[str, Any], where: str, prefixes: Sequence[str] = ()) -> Trust:
    """Returns what code the config of a run folder may import.

    Args:
      values: the resolved config.
      where: the run folder, for messages.
      prefixes: packages, modules or import paths that the user trusts besides.

    Raises:
      UserError: a prefix is empty.
    """
    given = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)
    if empty := [prefix for prefix in given if not prefix.strip(".:")]:
        raise UserError(f"trust: expected a package, module or import path, got {empty[0]!r}")
    return Trust(where, is_own(values), given, named_code(values))


def named_code(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the import paths that a resolved config names, by the dotted path of the field."""
    strings = ((path, value) for path, value in flatten_config(values) if isinstance(value, str))
    return {
        path: value
        for path, value in strings
        if ":" in value and (path == "task" or path == "fn" or path.endswith(".fn"))
    }


def record_own(values: Mapping[str, Any], where: str) -> str:
    """Records that a run with this config is the user's own; returns why it could not, empty where it could."""
    try:
        file = _record(values)
        if file.exists():
            sweep(file)
        else:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(file, json.dumps({"version": VERSION, "run": where, "time": round(time.time())}) + "\n")
    except (OSError, RuntimeError) as error:  # the latter where there is no home folder
        return (
            f"the state folder of jaxops cannot be written to ({getattr(error, 'strerror', None) or error}): this run"
            " is not known as your own, and evaluating it may ask for --trust; set JAXOPS_STATE to another folder"
        )
    return ""


def is_own(values: Mapping[str, Any]) -> bool:
    """Returns true if a process of this user has trained a run with exactly this config."""
    try:
        return _record(values).is_file()
    except (OSError, RuntimeError, TypeError, ValueError):  # no home folder, or no config at all
        return False


def without_places(values: Mapping[str, Any], places: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns a config with None at these dotted paths, and a line for each one that had a value.

    The paths name places to which opening the data would write.
    """
    out, left = copy.deepcopy(dict(values)), []
    for place in places:
        *above, last = place.split(".")
        section: Any = out
        for key in above:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(last) is not None:
            left.append(f"{place}: {section[last]}")
            section[last] = None
    return out, left


def _record(values: Mapping[str, Any]) -> Path:
    return state_root() / "runs" / f"{digest(values)}.json"


def _write(file: Path, text: str) -> None:
    """Writes a file that others may not read, at once and whole."""
    with folder_beside(file) as scratch:
        whole = scratch / file.name
        with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(whole, file)
