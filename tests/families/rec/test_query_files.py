"""The file that `predict` is given may be written as the run's own events are, or as such files usually are."""

from pathlib import Path

import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.data.clicks.columns import given_columns
from jaxops.data.clicks.spec import ClicksFile
from jaxops.data.interactions.open import open_data
from jaxops.data.interactions.spec import Columns, InteractionsFile, MinCount
from jaxops.data.spec import TextFormat
from jaxops.families.rec.histories import read_histories

EVENTS = [("ann", "café", 3), ("ann", "thé", 1), ("bob", "thé", 2), ("bob", "café", 4), ("bob", "eau", 5)]
HISTORIES = {"ann": ["thé", "café"], "bob": ["thé", "café", "eau"]}
LATIN = TextFormat(separator="~", encoding="latin-1")


def write(path: Path, separator: str, encoding: str, *, header: bool = True) -> Path:
    lines = [separator.join(map(str, row)) for row in ([("user", "item", "time")] if header else []) + EVENTS]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def histories(path: Path, data: InteractionsFile) -> dict[str, list[str]]:
    items = open_data(data).inter.item_ids
    found = read_histories(path, data, items)
    assert (found.unknown_users, found.unknown_items) == (0, 0)
    parts = np.split(items.originals(found.items), found.offsets[1:-1])
    return {str(user): list(map(str, part)) for user, part in zip(found.users, parts, strict=True)}


@pytest.mark.parametrize(("separator", "encoding"), [("~", "latin-1"), (",", "utf-8"), (";", "utf-8")])
def test_events_as_the_run_s_own_or_as_usual(tmp_path, separator, encoding):
    """No sniffing finds `~`, and Latin-1 in a file is decided by its config."""
    data = InteractionsFile(str(write(tmp_path / "plays.csv", "~", "latin-1")), text=LATIN)
    asked = write(tmp_path / "asked.csv", separator, encoding) if encoding != "latin-1" else Path(data.path)
    assert histories(asked, data) == HISTORIES


def test_without_a_header_line_and_with_a_suffix_of_its_own(tmp_path):
    header = ("user", "item", "time")
    path = write(tmp_path / "plays.dat", "::", "utf-8", header=False)
    data = InteractionsFile(str(path), format="csv", header=header, text=TextFormat(separator="::"))
    assert histories(path, data) == HISTORIES
    assert histories(write(tmp_path / "asked.csv", ",", "utf-8"), data) == HISTORIES  # its header line is no event
    assert histories(write(tmp_path / "asked.dat", "::", "utf-8"), data) == HISTORIES


def test_users_alone(tmp_path):
    data = InteractionsFile(str(write(tmp_path / "plays.csv", "~", "latin-1")), text=LATIN)
    (tmp_path / "users.csv").write_text("user~group\nbob~1\n")
    assert histories(tmp_path / "users.csv", data) == {"bob": HISTORIES["bob"]}


def test_what_fits_neither_is_told_with_the_columns_that_it_has(tmp_path):
    data = InteractionsFile(
        str(write(tmp_path / "plays.csv", "~", "latin-1")), columns=Columns(), min_count=MinCount(), text=LATIN
    )
    (tmp_path / "asked.csv").write_text("users,item\nann,thé\n")
    items = open_data(data).inter.item_ids
    with pytest.raises(UserError, match=r"asked.csv: no column 'user'"):
        read_histories(tmp_path / "asked.csv", data, items)
    with pytest.raises(UserError, match="no data file"):
        read_histories(tmp_path / "none.csv", data, items)


def test_rows_of_clicks_come_along_in_the_dialect_of_the_run(tmp_path):
    path = write(tmp_path / "clicks.csv", "~", "latin-1")
    rows = given_columns(ClicksFile(path=str(path), text=LATIN), path)
    assert rows.column_names == ["user", "item", "time"] and rows["item"].to_pylist() == [item for _, item, _ in EVENTS]
