"""What README and docs import from jaxops is there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"^[ \t]*from (jaxops[\w.]*) import ([\w, ]+)", re.MULTILINE)
IMPORTS = [
    (path.name, module, name.split(" as ")[0].strip())
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for module, names in LINE.findall(path.read_text(encoding="utf-8"))
    for name in names.split(",")
]


def test_the_docs_import_something():
    assert len(IMPORTS) > 10


@pytest.mark.parametrize(("page", "module", "name"), IMPORTS)
def test_what_is_imported_is_there(page, module, name):
    assert hasattr(importlib.import_module(module), name), f"{page}: from {module} import {name}"
