"""Runs the code cells of a notebook one after another, as a kernel would, and leaves its variables in the namespace.

`python run_notebook.py NOTEBOOK`: plain Python suffices, since no cell uses a magic.
"""

import json
import sys
from pathlib import Path
from typing import Any


def run_notebook(path: str) -> dict[str, Any]:
    """Runs the cells and returns the variables."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{Path(path).name}[{number}]", "exec"), namespace)
    return namespace


if __name__ == "__main__":
    run_notebook(sys.argv[1])
