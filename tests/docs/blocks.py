"""The fenced blocks of README and docs."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block, with the page and the line that it stands at."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Returns all blocks of these languages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M):
            if match[1] in languages:
                found.append(Block(page.name, text[: match.start()].count("\n") + 1, match[1], match[2]))
    return found


def commands(block: Block) -> list[list[str]]:
    """Returns the words of each line of a shell block, without comments and the folder of the environment."""
    lines = (shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines())
    return [[re.sub(r"^\.venv[^/]*/bin/", "", words[0]), *words[1:]] for words in lines if words]


def file_name(block: Block) -> str | None:
    """Returns the name in the first line of a block, `# losses.py`."""
    match = re.match(r"# ([\w-]+\.\w+)\b", block.text)
    return match[1] if match else None
