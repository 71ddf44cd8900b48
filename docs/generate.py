"""Writes the reference pages of the documentation out of the code: the config, the commands, the examples."""

import argparse
import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxops.cli.main import _parser
from jaxops.config.files import shipped_configs, shipped_examples
from jaxops.config.node import plain_node
from jaxops.config.reference import SectionReference, sections, values_at
from jaxops.config.yaml_text import parse_yaml
from jaxops.run.config import common_sections
from jaxops.run.family import family_of, shipped

MOST_EXAMPLES = 3
TITLES = {"rec": "Recommenders", "language": "Language models", "reward": "Reward models", "policy": "Policies"}


def write_references(folder: Path) -> None:
    """Writes all generated pages into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    configs = {
        f"{file.parent.name}/{file.stem}": plain_node(parse_yaml(file.read_text(encoding="utf-8"), str(file)))
        for file in sorted(shipped_configs().glob("*/*.yaml"))
    }
    common: list[str] = []
    for task in shipped():
        title = TITLES.get(task, task)
        lines = [f"# Config of task `{task}`", "", f"{title}: what a YAML file with `task: {task}` may hold."]
        lines += ["The sections that all families have are in [their own page](config_common.md)."]
        seen: set[tuple[str, str]] = set()
        for section in sections(family_of(task).config):
            if (section.path, section.source) in seen:  # such as `data.split`, which several kinds of data have
                continue
            seen.add((section.path, section.source))
            own = {name: tree for name, tree in configs.items() if name.startswith(f"{task}/")}
            shared = section.path.partition(".")[0] in common_sections()
            if shared and section.path and task == shipped()[0]:
                common += _section(section, configs)
            if not (shared and section.path):
                lines += _section(section, own)
        (folder / f"config_{task}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    head = ["# Config of every run", "", "The sections that a config has whatever its task is.", *common]
    (folder / "config_common.md").write_text("\n".join(head) + "\n", encoding="utf-8")
    (folder / "commands.md").write_text("\n".join(_commands()) + "\n", encoding="utf-8")
    for notebook in sorted((shipped_examples() / "notebooks").glob("*.ipynb")):
        text = notebook.read_text(encoding="utf-8").replace("../../docs/", "../")  # links hold in the repository
        (folder / notebook.name).write_text(text, encoding="utf-8")
    (folder / "examples.md").write_text("\n".join(_examples()) + "\n", encoding="utf-8")


def _section(section: SectionReference, configs: dict[str, object]) -> Iterator[str]:
    """Yields the lines of one section: its words, and a list of its fields."""
    place = f"`{section.path}`" if section.path else "The config itself"
    kind = f", `kind: {section.kind}`" if section.kind else ""
    yield from ("", f"## {place}{kind}", "", section.text, "", f"*`{section.source}`*", "")
    for field in section.fields:
        name = field.path.rpartition(".")[2]
        if name != "kind":
            default = f"default `{_code(field.default)}`" if field.default else "must be given"
            used = "; ".join(_used(field.path, configs)) if name != "task" else ""
            words = [f"* **`{name}`**: {field.expected}; {default}.", _sentence(field.text)]
            yield " ".join(filter(None, [*words, f"*Shipped: {used}.*" if used else ""]))


def _used(path: str, configs: dict[str, object]) -> Iterator[str]:
    found = ((name, value) for name, tree in configs.items() for value in values_at(tree, path))
    plain = [(name, value) for name, value in found if not isinstance(value, dict | list)]
    yield from (f"`{_code(str(value))}` in {name}" for name, value in plain[:MOST_EXAMPLES])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _code(text: str) -> str:
    return text.replace("\n", " ").replace("`", "'")


def _commands() -> Iterator[str]:
    """Yields the help of every command as it is printed."""
    yield from ("# Commands", "", "What `jaxops COMMAND --help` prints.")
    parser = _parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for name, command in commands.choices.items():
        yield from ("", f"## jaxops {name}", "", "```text", command.format_help().strip(), "```")
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner, made in action.choices.items():
                    yield from ("", f"### jaxops {name} {inner}", "", "```text", made.format_help().strip(), "```")


def _examples() -> Iterator[str]:
    """Yields every example program, whole."""
    yield from ("# Example programs", "", "Each is in one file, runs as it is, and is run by the tests.")
    yield "`jaxops examples NAME > NAME.py` writes one into the current folder."
    for path in sorted(shipped_examples().glob("*.py")):
        program = path.read_text(encoding="utf-8")
        title = (ast.get_docstring(ast.parse(program)) or path.stem).partition("\n")[0]
        yield from ("", f"## {path.stem}", "", title, "", "```python", program.strip(), "```")
