"""How the documentation is built: `make docs`. Pages are Markdown; references are generated from the code."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from generate import write_references  # noqa: E402

from jaxops.core.version import VERSION  # noqa: E402

project, author, release = "jaxops", "the jaxops authors", VERSION
copyright = "the jaxops authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["requirements.txt", "_build", "**.ipynb_checkpoints"]
html_theme = "sphinx_book_theme"
html_title = "jaxops"
html_static_path = ["_static"]
html_css_files = ["jaxops.css"]
html_theme_options = {"show_navbar_depth": 1, "home_page_in_toc": True, "show_toc_level": 2, "navbar_persistent": []}
myst_enable_extensions = ["colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the notebooks carry their outputs; tests/examples runs them
default_role = "code"  # docstrings write `name` for code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
copybutton_prompt_text = "$ "

write_references(HERE / "generated")


def code_examples(app, what, name, obj, options, lines: list[str]) -> None:
    """Turns the lines below `Example:` into a block of code; elsewhere they would be read as prose."""
    out: list[str] = []
    inside = False
    for line in lines:
        if line.strip() == "Example:":
            inside = True
            out += ["", ".. rubric:: Example", "", ".. code-block:: python", ""]
        else:
            inside = inside and (not line.strip() or line.startswith(" "))
            out.append(f"  {line}" if inside and line.strip() else line)
    lines[:] = out


def setup(app) -> None:
    """Registers the change of docstrings, before napoleon reads them."""
    app.connect("autodoc-process-docstring", code_examples, priority=400)
