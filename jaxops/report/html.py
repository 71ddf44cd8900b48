"""Fills a page's template and writes the page to disk, for the report and the comparison alike."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jaxops.core.failures import RunFailed
from jaxops.core.whole_files import replace_file


def fill_template(template: str, **values: Any) -> str:
    """Returns the HTML of a template in `templates/`; every value that is not Markup is escaped."""
    environment = Environment(
        loader=PackageLoader("jaxops.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def write_page(path: Path, html: str, hint: str = "") -> Path:
    """Writes a page whole or not at all, makes its folder, and returns its path.

    Raises:
      RunFailed: it cannot be written there; the message ends with `hint`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [html.encode("utf-8", errors="replace")])
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error.strerror or error}{hint}") from error
    return path
