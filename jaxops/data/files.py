"""Expands what a user writes (file, glob, folder, URI, list of them) to one ordered list of files of one format.

The order (as listed; sorted inside a glob or folder) defines the original row order, so it never depends on
the disk.
"""

import dataclasses
import glob
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from jaxops.core.failures import UserError, nearest
from jaxops.data.spec import Format, TextFormat

SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSIONS = (".gz", ".bz2", ".zst")


@dataclasses.dataclass(frozen=True)
class DataFile:
    """One input file; `partition` holds the `key=value` folders of its path (hive), `text` the options of text."""

    name: str
    path: str
    filesystem: pafs.FileSystem
    format: Format
    size: int
    mtime_ns: int
    partition: dict[str, str]
    text: TextFormat = TextFormat()

    def stream(self) -> pa.NativeFile:
        """Opens the file for reading from the start, decompressed where the suffix says so."""
        return self.filesystem.open_input_stream(self.path, compression="detect")

    def random(self) -> pa.NativeFile:
        return self.filesystem.open_input_file(self.path)


def expand_paths(path: str | Sequence[str], format: Format = "auto", text: TextFormat = TextFormat()) -> list[DataFile]:
    """Returns the files that `path` stands for, each once, all of one format; `text` says how CSV and TSV are written.

    Raises:
      UserError: nothing there, a glob that matches nothing, a suffix that is not known, or mixed formats.
    """
    given = [path] if isinstance(path, str) else list(path)
    if not given:
        raise UserError("the list of data files is empty; give at least one path")
    files: dict[str, DataFile] = {}
    for one in given:
        for file in _remote(one, format) if "://" in one else _local(one, format):
            files.setdefault(file.name, file)
    found = [dataclasses.replace(file, text=text) for file in files.values()]
    formats = {file.format: file.name for file in reversed(found)}
    if len(formats) > 1:
        examples = ", ".join(f"{name} ({kind})" for kind, name in sorted(formats.items()))
        raise UserError(f"data files of different formats cannot be read together: {examples}; list one format")
    return found


def summary(files: Sequence[DataFile]) -> str:
    """Names files in a message."""
    return files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more file(s)"


def _local(path: str, format: Format) -> list[DataFile]:
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        names = _inside(path, sorted(str(p) for p in Path(expanded).rglob("*") if p.is_file()), expanded, format)
    elif os.path.isfile(expanded):
        names = [expanded]
    else:
        names = sorted(p for p in glob.glob(expanded, recursive=True) if os.path.isfile(p))
        if not names:
            raise UserError(_not_there(path, expanded))
    filesystem = pafs.LocalFileSystem()
    files = []
    for name in names:
        stat = os.stat(name)
        files.append(_file(name, os.path.abspath(name), filesystem, format, stat.st_size, stat.st_mtime_ns))
    return files


def _remote(uri: str, format: Format) -> list[DataFile]:
    """Returns the files of a URI that pyarrow has a filesystem for (gs://, s3://, hdfs://, file://), globs too."""
    scheme, _, rest = uri.partition("://")
    parts = rest.split("/")
    wild = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    try:
        filesystem, base = pafs.FileSystem.from_uri(f"{scheme}://{'/'.join(parts[:wild])}")
        info = filesystem.get_file_info(base)
        if wild == len(parts) and info.type == pafs.FileType.File:
            infos = [info]
        else:
            infos = filesystem.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read data from {uri}: {error}") from error
    infos = sorted((i for i in infos if i.type == pafs.FileType.File), key=lambda i: i.path)
    if wild < len(parts):
        pattern = _glob_pattern("/".join([base.rstrip("/"), *parts[wild:]]))
        infos = [i for i in infos if pattern.fullmatch(i.path)]
    elif infos != [info]:
        wanted = set(_inside(uri, [i.path for i in infos], base, format))
        infos = [i for i in infos if i.path in wanted]
    if not infos:
        raise UserError(f"no data file at {uri}")
    return [_file(f"{scheme}://{i.path}", i.path, filesystem, format, i.size, int(i.mtime_ns or 0)) for i in infos]


def _file(name: str, path: str, filesystem: pafs.FileSystem, format: Format, size: int, mtime_ns: int) -> DataFile:
    pairs = (part.split("=", 1) for part in path.split("/")[:-1] if "=" in part)
    partition = {key: urllib.parse.unquote(value) for key, value in pairs}
    return DataFile(name, path, filesystem, _format_of(name, format), size, mtime_ns, partition)


def _format_of(name: str, format: Format) -> Format:
    if format != "auto":
        return format
    suffix = _suffix(name)
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UserError(
            f"cannot tell the format of {name} from its suffix {suffix!r} (known: {known}; text also as "
            f"{', '.join(COMPRESSIONS)}){nearest(suffix, SUFFIXES)}. If it is csv, tsv, jsonl or parquet, "
            "say so with `format:`"
        )
    return SUFFIXES[suffix]


def _suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def _inside(shown: str, names: list[str], folder: str, format: Format) -> list[str]:
    """Returns a folder's data files: hidden files and those that begin with `_` (markers, logs) are not data."""
    visible = [n for n in names if not re.search(r"(^|/)[._]", os.path.relpath(n, folder))]
    wanted = [n for n in visible if format != "auto" or _suffix(n) in SUFFIXES]
    if not wanted:
        raise UserError(f"the folder {shown} holds no data file ({', '.join(SUFFIXES)}); it has {_some(visible)}")
    return wanted


def _not_there(path: str, expanded: str) -> str:
    if glob.has_magic(expanded):
        return f"no file matches {path!r} (looked from {os.getcwd()})"
    folder = os.path.dirname(expanded) or "."
    if not os.path.isdir(folder):
        return f"no data file {path}: the folder {folder} does not exist (looked from {os.getcwd()})"
    there = sorted(os.listdir(folder))
    return f"no data file {path}{nearest(os.path.basename(expanded), there)} ({folder} has {_some(there)})"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(os.path.basename(n) for n in names[:8])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 8 else (shown or "nothing in it")


def _glob_pattern(pattern: str) -> re.Pattern[str]:
    """Translates a glob: `*` and `?` stay inside a folder, `**/` crosses folders, `[ab]` is a set."""
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|[^*?\[]+|\[", pattern):
        special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        is_set = token.startswith("[") and len(token) > 1
        out += special.get(token) or (token.replace("[!", "[^") if is_set else re.escape(token))
    return re.compile(out)
