"""A page from its template, and onto the disk: what the report and the comparison do alike."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from jaxops.core.failures import RunFailed
from jaxops.core.writers import replace_file


def fill_template(template: str, **values: Any) -> str:
    """The HTML of a template in `templates/`; every value is escaped that is not Markup."""
    environment = Environment(
        loader=PackageLoader("jaxops.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def write_page(path: Path, html: str, hint: str = "") -> Path:
    """Writes a page whole or not at all, making its folder, and returns where it is.

    Raises:
      RunFailed: it cannot be written there; the message ends with `hint`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [html.encode("utf-8", errors="replace")])
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error.strerror or error}{hint}") from error
    return path
