"""The dialect of text files: separator, quotes and encoding, from the config or from the beginning of the file.

A quoted field that does not close properly is an error with its line, since it would swallow the rows after it.
"""

import codecs
import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.files import DataFile

SAMPLE = 1 << 20
"""The number of bytes that are looked at to find the dialect."""
BLOCK = 1 << 22
"""The number of bytes that are checked or converted at once."""
LONGEST = 1 << 24
"""The largest number of bytes in a quoted field; one that is still open after so many is taken for unclosed."""
JOINT = "\x1f"
"""The character that replaces a separator of several characters, which the parser cannot read."""
SEPARATORS = (",", ";", "\t", "|", "::")
_WIDE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The dialect of one file.

    Attributes:
      separator: the characters between two fields.
      quoted: true where fields may stand in double quotes.
      encoding: the encoding, by the name that Python gives it.
    """

    separator: str
    quoted: bool
    encoding: str

    @property
    def delimiter(self) -> str:
        """The separator if it is one byte, else `JOINT`, which replaces it."""
        return self.separator if len(self.separator.encode()) == 1 else JOINT

    def fields(self, line: str) -> list[str]:
        """Splits one line into its fields."""
        line = line.replace(self.separator, self.delimiter)
        if not self.quoted:
            return line.split(self.delimiter)
        return next(csv.reader([line], delimiter=self.delimiter), [])


def dialect_of(file: DataFile, wanted: Sequence[str] = (), header: Sequence[str] | None = None) -> Dialect:
    """Returns the file's dialect. A note tells what is unusual for its format, unless the config says it.

    Args:
      file: a text file.
      wanted: columns that the first line should name; a separator is chosen that finds them all in it.
      header: the names of the columns where the file has no header line.

    Raises:
      UserError: Python does not know the encoding of the config.
    """
    with file.stream() as stream:
        sample = stream.read(SAMPLE)
    encoding = _encoding(file, sample)
    text = codecs.getincrementaldecoder(encoding)("replace").decode(sample)
    line = next(iter(io.StringIO(text)), "").rstrip("\n")
    usual = "\t" if file.format == "tsv" else ","
    given = file.text.separator
    separators = [given] if given != "auto" else [usual, *(one for one in SEPARATORS if one != usual)]
    options = [Dialect(one, _quoted(file, one, line), encoding) for one in separators]
    found = next((one for one in options if _fits(one.fields(line), file, wanted, header)), options[0])
    told = []
    if found.separator != usual and given == "auto":
        told.append(f"its columns are apart by {found.separator!r} (text.separator)")
    if file.format == "tsv" and found.quoted and file.text.quote == "auto":
        told.append("its fields are in quotes (text.quote)")
    if encoding not in ("utf-8", "utf-8-sig") and file.text.encoding == "auto":
        told.append(f"it is no UTF-8 and is read as {encoding} (text.encoding)")
    if told:
        notes.tell(f"{file.name}: {'; '.join(told)}")
    return found


def _encoding(file: DataFile, sample: bytes) -> str:
    given = file.text.encoding
    if given != "auto":
        try:
            return codecs.lookup(given).name
        except LookupError:
            raise UserError(
                f"text.encoding: {given!r} is no encoding that Python knows (utf-8, latin-1, ...)"
            ) from None
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        # Latin-1 has no order of bytes that it refuses, so it is taken only where nothing looks like UTF-8.
        return "utf-8" if _WIDE.search(sample) or b"\0" in sample else "iso8859-1"
    return "utf-8"


def _quoted(file: DataFile, separator: str, line: str) -> bool:
    if file.text.quote != "auto":
        return file.text.quote == "double"
    if len(separator) > 1:
        return False
    if file.format == "csv":
        return True
    names = line.strip("\r").split(separator)
    return all(len(name) > 1 and name[0] == name[-1] == '"' for name in names)


def _fits(fields: Sequence[str], file: DataFile, wanted: Sequence[str], header: Sequence[str] | None) -> bool:
    if header is not None:
        return len(fields) == len(header)
    if not wanted:
        return len(fields) > 1
    names = {name.removeprefix("\ufeff") for name in fields} | file.partition.keys()
    return names >= set(wanted)


def names_of(file: DataFile, dialect: Dialect) -> list[str]:
    """Returns the names of the columns in the first line."""
    with file.stream() as stream, io.TextIOWrapper(stream, dialect.encoding, errors="replace") as text:
        return dialect.fields(text.readline().removeprefix("\ufeff").rstrip("\r\n"))


def open_text(file: DataFile, dialect: Dialect) -> io.RawIOBase:
    """Opens the file as UTF-8 with `dialect.delimiter` between fields; reading raises UserError at a stray quote."""
    plain = dialect.encoding in ("utf-8", "utf-8-sig") and dialect.separator == dialect.delimiter
    return _Blocks(_blocks(file, dialect, plain))


def not_utf8(file: DataFile) -> str:
    """Returns an error message about the first line that is no UTF-8; empty where there is none."""
    with file.stream() as stream:
        for number, line in enumerate(io.BufferedReader(_Raw(stream)), 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                shown = line[max(error.start - 20, 0) : error.end + 20]
                return (
                    f"{file.name}:{number}: {shown!r} is no UTF-8 text; say which encoding it is"
                    " (text.encoding: latin-1, ...), or mend the line"
                )
    return ""


def _blocks(file: DataFile, dialect: Dialect, plain: bool) -> Iterator[bytes]:
    """Yields blocks of bytes that end where rows end."""
    with file.stream() as stream:
        decoder = codecs.getincrementaldecoder(dialect.encoding)()
        checked = _Quotes(file, dialect.delimiter.encode()) if dialect.quoted else None
        rest, last = b"", False
        while not last:
            block = stream.read(BLOCK)
            last = not block
            if not plain:
                block = _converted(file, decoder, block, last)
            rest += block
            end = len(rest) if last else rest.rfind(b"\n") + 1
            if checked is not None:
                end = checked.until(rest, last)
            ready, rest = rest[:end], rest[end:]
            if dialect.separator != dialect.delimiter:
                if JOINT.encode() in ready:
                    raise UserError(
                        f"{file.name}: holds the control character 0x1f, which stands for {dialect.separator}"
                    )
                ready = ready.replace(dialect.separator.encode(), JOINT.encode())
            if ready:
                yield ready


def _converted(file: DataFile, decoder: codecs.IncrementalDecoder, block: bytes, last: bool) -> bytes:
    try:
        return decoder.decode(block, last).encode()
    except UnicodeDecodeError as error:
        shown = error.object[max(error.start - 20, 0) : error.end + 20]
        raise UserError(f"{file.name}: {shown!r} is no {error.encoding} text (text.encoding)") from None


class _Quotes:
    """Finds the ends of rows, and quoted fields that do not close properly."""

    def __init__(self, file: DataFile, delimiter: bytes) -> None:
        self._file, self._lines = file, 0
        self._delimiter = delimiter
        between = re.escape(delimiter)
        quoted = rb'"[^"]*+(?:""[^"]*+)*+"'
        letters = rb"[^\n" + between + rb"]*+"
        field = rb"(?:" + quoted + rb'|(?!")' + letters + rb")"
        row = field + rb"(?:" + between + field + rb")*+\r?\n"
        self._rows = re.compile(rb"(?:" + row + rb")*+")
        self._quoted, self._letters = re.compile(quoted), re.compile(letters)

    def until(self, text: bytes, last: bool) -> int:
        """Returns how many bytes at the beginning of `text` are complete rows; a row begins at its first byte.

        Raises:
          UserError: a quoted field goes on after its closing quote, or has none.
        """
        if b'"' not in text:
            end = text.rfind(b"\n") + 1
        else:
            rows = self._rows.match(text)
            assert rows is not None  # no row at all matches too
            end = rows.end()
            self._check_row(text, end, last)
        end = len(text) if last else end
        self._lines += text.count(b"\n", 0, end)
        return end

    def _check_row(self, text: bytes, at: int, last: bool) -> None:
        """Raises a UserError if a quoted field is wrong in the row that begins at `at`; its end may be yet to come."""
        while at < len(text):
            quoted = text[at : at + 1] == b'"'
            field = (self._quoted if quoted else self._letters).match(text, at)
            if field is None:
                if last or len(text) - at > LONGEST:
                    self._refuse(text, at, "does not close")
                return
            after = text[field.end() : field.end() + 2]
            if after[:1] != self._delimiter:
                if quoted and after not in (b"", b"\r", b"\r\n") and after[:1] != b"\n":
                    self._refuse(text, at, "goes on after its closing quote")
                return
            at = field.end() + 1

    def _refuse(self, text: bytes, start: int, what: str) -> None:
        line = self._lines + text.count(b"\n", 0, start) + 1
        shown = text[start : start + 40].decode(errors="replace")
        raise UserError(
            f"{self._file.name}:{line}: a quoted field opens here and {what}: {shown!r}; double quotes inside of quoted"
            " fields, or say that quotes are letters (text.quote: none)"
        )


class _Blocks(io.RawIOBase):
    """A stream that reads from an iterator of bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        """Returns true."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Returns up to `size` bytes, none at the end."""
        if not self._rest:
            self._rest = memoryview(next(self._blocks, b""))
        size = len(self._rest) if size < 0 else size
        found, self._rest = self._rest[:size], self._rest[size:]
        return found.tobytes()

    def close(self) -> None:
        """Closes the iterator, and with it the file that it reads."""
        if not self.closed:
            getattr(self._blocks, "close", lambda: None)()
        super().close()


class _Raw(io.RawIOBase):
    """A raw stream that reads from an Arrow stream, so that `io.BufferedReader` takes it."""

    def __init__(self, stream: object) -> None:
        self._stream = stream

    def readable(self) -> bool:
        """Returns true."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills the buffer and returns the number of bytes."""
        found = self._stream.read(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(found)] = found
        return len(found)
