"""Finds configuration files, in the user's own folders and then among those shipped, and follows `base:`."""

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxops.config.environment import expand_text
from jaxops.config.errors import ConfigError, Problem, one_of
from jaxops.config.node import Node
from jaxops.config.yaml_text import MAX_BYTES, parse_yaml
from jaxops.core.failures import UserError

ConfigPath = str | os.PathLike[str]


def shipped_configs() -> Path:
    """Returns the folder of the shipped configurations: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_examples() -> Path:
    """Returns the folder of the example programs: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "examples"
    return inside if inside.is_dir() else package.parent / "examples"


def find_config(name: ConfigPath, beside: Path | None = None) -> Path:
    """Finds the file `name`, with or without `.yaml`: in `beside`, in the current folder, or among the shipped ones.

    `rec/movielens_sasrec`, `configs/rec/movielens_sasrec.yaml` and a path of the user's own all work.

    Raises:
      UserError: there is no such file; the nearest names are listed.
    """
    try:
        wanted = Path(name).expanduser()
    except RuntimeError:  # ~nobody
        raise UserError(f"no such configuration: '{name}': there is no home folder of that name") from None
    inside = Path(*wanted.parts[1:]) if wanted.parts[:1] == ("configs",) else wanted
    tried = [folder / wanted for folder in (beside, Path()) if folder is not None] + [shipped_configs() / inside]
    for path in tried:
        for candidate in (path, path.with_name(path.name + ".yaml")) if path.name else ():
            if _is(Path.is_file, candidate):
                return candidate
    folder = next((path for path in tried if _is(Path.is_dir, path)), None)
    if folder is not None:
        listed = ", ".join(sorted(path.name for path in folder.glob("*.yaml"))) or "none"
        raise UserError(f"'{name}' is a folder; a configuration is a file (YAML files in it: {listed})")
    raise UserError(f"no such configuration: '{name}'{_near(wanted, inside, tried[0].parent)}")


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    """Returns `kind(path)`, and false for a name that no file can have (too long, or with NUL)."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def _near(wanted: Path, inside: Path, folder: Path) -> str:
    shipped = shipped_configs()
    known = [path.relative_to(shipped).with_suffix("").as_posix() for path in sorted(shipped.rglob("*.yaml"))]
    own = {path.stem: str(wanted.with_name(path.name)) for path in sorted(folder.glob("*.yaml"))}
    close = [own[stem] for stem in difflib.get_close_matches(wanted.stem, own, n=3, cutoff=0.6)]
    close += difflib.get_close_matches(inside.with_suffix("").as_posix(), known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {one_of([repr(name) for name in close])}?"
    return f" (shipped: {', '.join(known)})" if known else ""


def read_files(paths: Sequence[ConfigPath]) -> list[Node]:
    """Reads the files and all files in their `base:`, in the order in which they are merged (the last one wins).

    A base is searched beside the file that names it, in the current folder, then among the shipped ones. Paths with a
    scheme (`gs://...`) are read through etils.epath.

    Raises:
      ConfigError: a file is missing, unreadable, not YAML or not a mapping, or the bases form a circle.
    """
    trees: list[Node] = []
    for path in paths:
        _read(path, "", None, (), trees)
    return trees


def _read(name: ConfigPath, origin: str, beside: Path | None, chain: tuple[str, ...], trees: list[Node]) -> None:
    text, shown, folder = _open(name, origin, beside)
    if shown in chain:
        circle = " -> ".join([*chain[chain.index(shown) :], shown])
        raise ConfigError([Problem("base", origin, str(name), f"the bases form a circle: {circle}")])
    tree = parse_yaml(text, shown)
    if tree.value is None:
        tree = Node({}, shown)
    if not isinstance(tree.value, dict):
        raise ConfigError([Problem("", tree.origin, None, "expected a mapping of keys to values (`key: value`)")])
    entries = dict(tree.value)
    base = entries.pop("base", None)
    if base is not None:
        for entry in base.value if isinstance(base.value, list) else [base]:
            if not isinstance(entry.value, str):
                raise ConfigError([Problem("base", entry.origin, None, "expected a file, or a list of files")])
            try:
                wanted = expand_text(entry.value)
            except UserError as error:
                raise ConfigError([Problem("base", entry.origin, entry.value, str(error))]) from None
            _read(wanted, entry.origin, folder, (*chain, shown), trees)
    trees.append(Node(entries, shown))


def _open(name: ConfigPath, origin: str, beside: Path | None) -> tuple[str, str, Path | None]:
    """Returns the text, the name to show for it, and its folder (None where the file is not local)."""
    if "://" in os.fspath(name):
        return _remote(os.fspath(name)), os.fspath(name), None
    try:
        path = find_config(name, beside)
        with open(path, encoding="utf-8") as file:
            return file.read(MAX_BYTES + 1), _shown(path), path.parent
    except UserError as error:
        raise ConfigError([Problem("base", origin, str(name), str(error))]) if origin else error from None
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        if origin:
            raise ConfigError([Problem("base", origin, str(name), f"{os.fspath(name)}: {message}")]) from None
        raise ConfigError([Problem("", os.fspath(name), None, message)]) from None


def _remote(name: str) -> str:
    if not name.startswith(("gs://", "s3://")):
        raise ConfigError([Problem("", name, name, "a configuration is a local file, or at gs:// or s3://")])
    try:
        from etils import epath

        return epath.Path(name).read_text()
    except Exception as error:  # clients of object stores raise errors of any class
        message = f"cannot be read: {type(error).__name__}: {error}"
        raise ConfigError([Problem("", name, name, message)]) from error


def _shown(path: Path) -> str:
    """Returns the path relative to the current folder or the shipped ones, if it can, to keep messages short."""
    full = path.resolve()
    for folder, prefix in ((Path.cwd(), Path()), (shipped_configs(), Path("configs"))):
        if full.is_relative_to(folder.resolve()):
            return (prefix / full.relative_to(folder.resolve())).as_posix()
    return os.path.normpath(path)
