"""Reads examples of text from JSON lines, Parquet and CSV, in the forms that trainers of language models share.

A row that is wrong is told with its file and line; nothing is skipped or repaired unseen.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxops.core.failures import UserError, nearest
from jaxops.data.files import DataFile, expand_paths
from jaxops.data.formats import batches, columns
from jaxops.data.sources import local
from jaxops.data.spec import Format
from jaxops.data.text.spec import ChatData, CompletionData, OneTextData, TextData
from jaxops.data.text.template import BEGIN, END, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
BLOCK = 1 << 22
"""Bytes of JSON lines that are read at once."""
Parsed = TypeVar("Parsed")
SHOWN = 8
"""How many wrong rows a message lists."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One example as it was written.

    Attributes:
      where: its file and row, for messages.
      text: the text of a plain example; the prompt and the completion of a pair of texts, one after the other.
      prompt: the number of characters of `text` that are the prompt.
      messages: the conversation; the prompt's messages first.
      asked: the number of `messages` that are the prompt.
      tools: descriptions of functions.
      arguments: variables of the template for this conversation alone.
    """

    where: str
    text: str | None = None
    prompt: int = 0
    messages: tuple[Message, ...] = ()
    asked: int = 0
    tools: tuple[Any, ...] | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def said(self) -> list[str]:
        """All that is said in it: its text, or what each message says."""
        return [self.text] if self.text is not None else [str(message["content"]) for message in self.messages]

    def digest(self) -> bytes:
        """Returns 16 bytes that are the same for exact copies, wherever they stand."""
        said = [self.text, self.prompt, self.messages, self.asked, self.tools, self.arguments]
        written = json.dumps(said, sort_keys=True, ensure_ascii=True, default=str)
        return hashlib.blake2b(written.encode(), digest_size=16).digest()


class WrongRow(Exception):
    """A row cannot be learnt from; the message says why."""


def read_examples(config: OneTextData, path: str | Sequence[str]) -> list[Example]:
    """Reads all examples of the files at `path`, in order.

    Raises:
      UserError: no file, a file that is not of its format, rows that are wrong (the first ones, with their lines), or
        no row at all.
    """
    return parsed(path, config.format, wanted_columns(config), _parser(config))


def parsed(
    path: str | Sequence[str],
    format: Format,
    wanted: Mapping[str, bool] | None,
    parse: Callable[[str, dict[str, Any]], Parsed],
) -> list[Parsed]:
    """Reads all rows of the files at `path`, in order, each made something of by `parse(where, row)`.

    Args:
      path: files, globs, folders or named sources.
      format: the format of the files.
      wanted: the columns that are read, and whether each must be there; None reads all.
      parse: raises `WrongRow` for a row that is wrong.

    Raises:
      UserError: no file, a file that is not of its format, rows that are wrong (the first ones, with their lines), or
        no row at all.
    """
    files = expand_paths([local(one) for one in ([path] if isinstance(path, str) else path)], format)
    return parsed_rows((row for file in files for row in rows_of(file, wanted)), path, parse)


def parsed_rows(
    rows: Iterable[tuple[str, dict[str, Any]]],
    path: str | Sequence[str],
    parse: Callable[[str, dict[str, Any]], Parsed],
) -> list[Parsed]:
    """Makes something of each row by `parse(where, row)`, which raises `WrongRow` for a row that is wrong.

    `path` names the files in messages.

    Raises:
      UserError: rows that are wrong (the first ones, with their lines), or no row at all.
    """
    found: list[Parsed] = []
    wrong: list[str] = []
    count = 0
    for where, row in rows:
        try:
            found.append(parse(where, row))
        except WrongRow as error:
            count += 1
            if count <= SHOWN:
                wrong.append(f"{where}: {error}")
    if wrong:
        more = [f"... and {count - SHOWN} more"] if count > SHOWN else []
        raise UserError(
            "\n  ".join([f"{count} row(s) cannot be learnt from:", *wrong, *more]) if count > 1 else wrong[0]
        )
    if not found:
        raise UserError(f"no example in {path if isinstance(path, str) else ', '.join(path)}: the data files are empty")
    return found


def read_rows(path: str | Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Reads all columns of the rows of files, each with its place for messages.

    Raises:
      UserError: no file, or a file that is not of its format.
    """
    return [row for file in expand_paths(path) for row in rows_of(file, None)]


def checked_messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    """Returns the messages of a column.

    Args:
      value: the value of the column.
      name: its name.
      where: the place of the row, for messages.

    Raises:
      UserError: it is no list of messages.
    """
    try:
        return messages_in(value, name)
    except WrongRow as error:
        raise UserError(f"{where}: {error}") from None


def wanted_columns(config: OneTextData) -> dict[str, bool]:
    """Returns the columns that are read, and whether each must be there."""
    match config:
        case TextData():
            wanted = {config.columns.text: True}
        case ChatData():
            wanted = {config.columns.messages: True}
        case CompletionData():
            wanted = {config.columns.prompt: True, config.columns.completion: True}
    if not isinstance(config, TextData):
        wanted |= {config.columns.tools: True} if config.columns.tools else {"tools": False}
        wanted |= {"chat_template_kwargs": False}
    return wanted


def rows_of(file: DataFile, wanted: Mapping[str, bool] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row with its place; `wanted` says of the columns that are read whether each must be there.

    None reads all columns.

    Raises:
      UserError: the file is not of its format, or lacks a column.
    """
    if file.format == "jsonl":
        yield from _lines(file)
        return
    there = columns(file)
    wanted = dict.fromkeys(there, True) if wanted is None else wanted
    for name in (name for name, needed in wanted.items() if needed and name not in there):
        raise UserError(f"{file.name}: {_no_column(name, there)}")
    number = 0
    for batch in batches(file, [name for name in wanted if name in there], None):
        for row in batch.to_pylist():
            number += 1
            yield f"{file.name}, row {number}", row


def _lines(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of JSON lines.

    Raises:
      UserError: a line is no UTF-8, no JSON, or no object.
    """
    number, rest = 0, b""
    with file.stream() as stream:
        while True:
            block = stream.read(BLOCK)
            *lines, rest = (rest + block).split(b"\n") if block else (rest, b"")
            for line in lines:
                number += 1
                if line.strip():
                    yield f"{file.name}:{number}", _object(line, f"{file.name}:{number}", number == 1)
            if not block:
                return


def _object(line: bytes, where: str, first: bool) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: no UTF-8 text: byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
        ) from None
    except (ValueError, RecursionError) as error:
        hint = "; a JSON array is not JSON lines: write one object a line" if line.lstrip().startswith(b"[") else ""
        raise UserError(f"{where}: not JSON ({error}): {line[:60].decode('utf-8', 'replace')!r}{hint}") from None
    if not isinstance(value, dict):
        hint = "; a JSON array is not JSON lines: write one object a line" if isinstance(value, list) else ""
        raise UserError(f"{where}: expected a JSON object a line, got {shown(value)}{hint}")
    return value


def _parser(config: OneTextData) -> Callable[[str, dict[str, Any]], Example]:
    match config:
        case TextData():
            return lambda where, row: Example(where, text=text_in(row, config.columns.text))
        case ChatData():
            return lambda where, row: _chat(config, where, row)
        case CompletionData():
            return lambda where, row: _completion(config, where, row)


def _chat(config: ChatData, where: str, row: dict[str, Any]) -> Example:
    messages = messages_in(value_in(row, config.columns.messages), config.columns.messages)
    if config.loss_on == "assistant" and not any(message["role"] == "assistant" for message in messages):
        raise WrongRow("the conversation has no assistant turn, so there is nothing to learn from")
    return Example(where, messages=messages, tools=tools_in(row, config.columns.tools), arguments=arguments_in(row))


def _completion(config: CompletionData, where: str, row: dict[str, Any]) -> Example:
    names = config.columns
    prompt, completion = value_in(row, names.prompt), value_in(row, names.completion)
    if isinstance(prompt, str) != isinstance(completion, str):
        raise WrongRow(
            f"{names.prompt!r} is {sort_of(prompt)} and {names.completion!r} {sort_of(completion)}; "
            "both are text, or both lists of messages"
        )
    if isinstance(prompt, str):
        asked, said = text_in(row, names.prompt, empty=True), text_in(row, names.completion)
        return Example(where, text=asked + said, prompt=len(asked))
    before, after = messages_in(prompt, names.prompt), messages_in(completion, names.completion)
    if not any(message["role"] == "assistant" for message in after):
        raise WrongRow(f"{names.completion!r} has no assistant turn, so there is nothing to learn from")
    tools = tools_in(row, names.tools)
    return Example(where, messages=before + after, asked=len(before), tools=tools, arguments=arguments_in(row))


def value_in(row: Mapping[str, Any], name: str) -> Any:
    """Returns what a row has in a column; raises `WrongRow` where that is nothing."""
    if name not in row:
        raise WrongRow(_no_column(name, list(row)))
    if row[name] is None:
        raise WrongRow(f"column {name!r} is null")
    return row[name]


def _no_column(name: str, there: Sequence[str]) -> str:
    known = ", ".join(there[:12]) or "none"
    return f"no column {name!r}{nearest(name, there)} (there are: {known}); name it with `columns:`"


def text_in(row: Mapping[str, Any], name: str, empty: bool = False) -> str:
    """Returns the text that a row has in a column; raises `WrongRow` where that is none, or blank (unless `empty`)."""
    value = value_in(row, name)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise WrongRow(f"column {name!r} is {value[:40]!r}, which is no UTF-8 text") from None
    if not isinstance(value, str):
        raise WrongRow(f"column {name!r} is {sort_of(value)} ({shown(value)}), expected text")
    if not value.strip() and not (empty and not value):
        raise WrongRow(f"column {name!r} is empty" if not value else f"column {name!r} holds blanks alone")
    return checked_text(value, f"column {name!r}")


_NEVER = re.compile(f"[\0{BEGIN}{END}\ud800-\udfff]")


def checked_text(text: str, what: str) -> str:
    """Returns the text if every tokenizer can take it."""
    found = _NEVER.search(text)
    if found:
        names = {"\0": "NUL (U+0000)", BEGIN: "the noncharacter U+FDD0", END: "the noncharacter U+FDD1"}
        called = names.get(found[0], f"{found[0]!a}, half of a character")
        raise WrongRow(f"{what} holds {called} after {found.start()} characters, which is no text")
    return text


def messages_in(value: Any, name: str) -> tuple[Message, ...]:
    """Returns a list of messages; raises `WrongRow` where it is none. `name` is that of the column."""
    if not isinstance(value, list):
        raise WrongRow(f"column {name!r} is {sort_of(value)} ({shown(value)}), expected a list of messages")
    if not value:
        raise WrongRow(f"column {name!r} has no message")
    return tuple(_message(one, f"{name}[{at}]") for at, one in enumerate(value))


def _message(value: Any, what: str) -> Message:
    """Returns a message with its role, its content (text) and whatever else it has for the template."""
    if not isinstance(value, dict):
        raise WrongRow(f"{what} is {sort_of(value)} ({shown(value)}), expected a message with role and content")
    if "role" not in value:
        form = "; this is the form of ShareGPT, rename the keys" if {"from", "value"} <= value.keys() else ""
        raise WrongRow(f"{what} has no role (keys: {', '.join(map(str, value))}){form}")
    role = value["role"]
    if role not in ROLES:
        raise WrongRow(f"{what}: unknown role {role!r}{nearest(str(role), ROLES)} (known: {', '.join(ROLES)})")
    # Parquet gives every message every key: those that it does not have are null
    message = {key: entry for key, entry in value.items() if entry is not None}
    content = message.get("content")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], what)
    calls = role == "assistant" and bool(message.get("tool_calls"))
    if content is None and not calls:
        raise WrongRow(f"{what}: the {role} turn has no content")
    if content is not None and not isinstance(content, str):
        parts = "; parts other than text are not read" if isinstance(content, list) else ""
        raise WrongRow(f"{what}: the content is {sort_of(content)} ({shown(content)}), expected text{parts}")
    if role == "assistant" and not calls and not (content or "").strip():
        raise WrongRow(f"{what}: the assistant turn is empty")
    message["content"] = checked_text(content or "", f"{what}: the content")
    return message


def _calls(value: Any, what: str) -> list[Any]:
    """Returns the calls of functions in a message: a list, or a list written as JSON text (blank text is none)."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise WrongRow(f"{what}: tool_calls is no JSON: {shown(value)}") from None
    if not isinstance(value, list):
        raise WrongRow(f"{what}: tool_calls is {sort_of(value)} ({shown(value)}), expected a list of calls")
    for call in value:
        named = call.get("function") or call if isinstance(call, dict) else None
        # A template writes a call without a name as an empty answer, which would be learnt.
        if not (isinstance(named, dict) and isinstance(named.get("name"), str) and named["name"]):
            raise WrongRow(f"{what}: tool_calls holds {shown(call)}, expected a call with the name of its function")
    return value


def tools_in(row: Mapping[str, Any], name: str | None) -> tuple[Any, ...] | None:
    """Returns the descriptions of functions in a row: a list, or a list written as JSON text.

    `name` is that of the column; None looks whether there is a column `tools`. Raises `WrongRow` where it is no list.
    """
    value = row.get("tools") if name is None else value_in(row, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise WrongRow(f"column {name or 'tools'!r} is no JSON: {shown(value)}") from None
    if value is not None and not isinstance(value, list):
        raise WrongRow(f"column {name or 'tools'!r} is {sort_of(value)} ({shown(value)}), expected a list")
    return tuple(value) if value else None


def arguments_in(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row's own variables of the template (column `chat_template_kwargs`)."""
    value = row.get("chat_template_kwargs") or {}
    if not isinstance(value, dict):
        raise WrongRow(f"column 'chat_template_kwargs' is {sort_of(value)}, expected an object")
    return value


def sort_of(value: Any) -> str:
    """Returns the word for a value's type in messages."""
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """Returns a value as JSON, cut to fit into a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
