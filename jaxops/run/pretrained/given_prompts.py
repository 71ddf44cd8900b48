"""Prompts that a user gives to `sample`: a file, a table or a list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxops.core.failures import UserError
from jaxops.data.prompts.formats import prompt_lines
from jaxops.data.prompts.writer import Row
from jaxops.data.text.formats import read_rows
from jaxops.run.given_table import as_file


def prompt_rows(source: Any) -> list[Row]:
    """Reads prompts: a file (JSON lines, Parquet, CSV; of `.txt` each line), a table, or a list of texts or messages.

    Raises:
      UserError: there is no such file, it is not of its format, or it has no prompt.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        rows = [(f"prompt {at}", one if isinstance(one, dict) else {"prompt": one}) for at, one in enumerate(source)]
    elif str(source).endswith(".txt"):
        rows = _lines(Path(source))
    else:
        with as_file(source) as path:
            rows = read_rows(str(path))
    if not rows:
        raise UserError(f"no prompt in {source}" if isinstance(source, str | Path) else "there is no prompt")
    return rows


def _lines(path: Path) -> list[Row]:
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error}); expected a text file with a prompt a line") from None
    return [(where, {"prompt": line}) for where, line in prompt_lines(content, str(path))]
