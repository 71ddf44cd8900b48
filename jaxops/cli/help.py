"""`jaxops config --help FIELD` and `jaxops examples`: what a field means, and programs to begin with."""

import argparse
import ast
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jaxops.core.failures import EXIT_OK, UserError, nearest

MOST_EXAMPLES = 3
"""The values in shipped configs that are shown of a field."""
MOST_NAMES = 4
"""The fields of one name that are all offered where a path is not known."""
WIDTH = 100


class FieldHelp(argparse.Action):
    """`--help` without a field is the command's help; with one, what the field is."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, field: Any, __: Any = None) -> NoReturn:
        """Prints the help and exits with status 0.

        Raises:
          UserError: no family has such a field.
        """
        if field is None:
            parser.print_help()
        else:
            print("\n".join(field_help(field)))
        sys.exit(EXIT_OK)


def field_help(path: str) -> list[str]:
    """Returns lines about a field or a section of a config: of any shipped family, of a sweep, or of a loop.

    Raises:
      UserError: none of them has it; the nearest right name is given.
    """
    from jaxops.config.reference import find_fields, find_sections, sections

    # Entries that say the same are one: the common sections are those of every family.
    said: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    known: set[str] = set()
    for place, schema in _schemas():
        found = list(sections(schema))
        known |= {field.path for section in found for field in section.fields}
        inside = find_sections(found, path)
        for section in inside:
            entry = (f"kind: {section.kind}" if section.kind else "a section", section.text, *_fields(section))
            said.setdefault(entry, []).append((place, ""))
        for section, field in () if inside else find_fields(found, path):
            text = field.text or (section.text if section.path else "")
            said.setdefault((f"{field.expected}; {_default(field.default)}", text), []).append((place, section.kind))
    if not said:
        raise UserError(f"no field {path!r}{_right_name(path, known)}")
    lines = [path]
    for (first, text, *fields), where in said.items():
        lines += ["", f"  {first}   [{_where(where)}]"]
        lines += textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += [f"    {field}" for field in fields]
    examples = list(_in_shipped_configs(path))
    return lines + (["", f"  shipped: {'; '.join(examples[:MOST_EXAMPLES])}"] if examples else [])


def _schemas() -> Iterator[tuple[str, type]]:
    """Yields the config class of every shipped family, of sweeps and of loops, each with what it is a config of."""
    from jaxops.flow.rlhf.config import RlhfConfig
    from jaxops.run.family import family_of, shipped
    from jaxops.sweep.spec import SweepSpec

    yield from ((task, family_of(task).config) for task in shipped())
    yield "sweep", SweepSpec
    yield "rlhf", RlhfConfig


def _right_name(path: str, known: set[str]) -> str:
    """Returns a clause with the fields of the same last name, else with the nearest one: `lr` is `optimizer.lr`."""
    name = path.rpartition(".")[2]
    same = sorted((one for one in known if one.rpartition(".")[2] == name), key=lambda one: (one.count("."), one))
    if 0 < len(same) <= MOST_NAMES:
        return f"; did you mean {' or '.join(map(repr, same))}?"
    return nearest(path, known) or "; `jaxops config CONFIG` lists those of a config"


def _where(places: Sequence[tuple[str, str]]) -> str:
    """Returns the tasks, and the kinds of the section around the field where there are any."""
    tasks = [place for place in dict.fromkeys(place for place, _ in places) if place != "sweep"]
    where = [f"task {', '.join(tasks)}"] if tasks else []
    where += ["a sweep's file"] if len(tasks) < len({place for place, _ in places}) else []
    kinds = ", ".join(dict.fromkeys(kind for _, kind in places if kind))
    return "; ".join([kinds, *where] if kinds else where)


def _default(written: str) -> str:
    return f"default {written}" if written else "must be given"


def _fields(section: Any) -> list[str]:
    inside = [field for field in section.fields if field.path.rpartition(".")[2] != "kind"]
    return [f"{field.path.rpartition('.')[2]}: {field.expected}; {_default(field.default)}" for field in inside]


def _in_shipped_configs(path: str) -> Iterator[str]:
    """Yields the values that shipped configs have at a path, each with the config."""
    from jaxops.config.files import shipped_configs
    from jaxops.config.node import plain_node
    from jaxops.config.reference import values_at
    from jaxops.config.yaml_text import parse_yaml

    for file in sorted(shipped_configs().glob("*/*.yaml")):
        tree = plain_node(parse_yaml(file.read_text(encoding="utf-8"), str(file), lines=False))
        for value in values_at(tree, path):
            if not isinstance(value, dict | list):
                yield f"{value} in {file.parent.name}/{file.stem}"


def examples(args: argparse.Namespace) -> int:
    """Runs `jaxops examples [NAME]`: lists the example programs, or prints one.

    Raises:
      UserError: there is no such example.
    """
    from jaxops.cli.text import aligned
    from jaxops.config.files import shipped_examples

    programs = {path.stem: path for path in sorted(shipped_examples().glob("*.py"))}
    if args.name is None:
        rows = [(name, _summary(path.read_text(encoding="utf-8"))) for name, path in programs.items()]
        print("\n".join(aligned(rows)))
        print("`jaxops examples NAME > NAME.py` writes one, `python NAME.py` runs it")
        return EXIT_OK
    name = args.name.removesuffix(".py")
    if name not in programs:
        raise UserError(f"no example {name!r}{nearest(name, programs)} (known: {', '.join(programs)})")
    sys.stdout.write(programs[name].read_text(encoding="utf-8"))
    return EXIT_OK


def _summary(program: str) -> str:
    """Returns the first line of a program's docstring."""
    return (ast.get_docstring(ast.parse(program)) or "").partition("\n")[0]


def add_arguments(config: argparse.ArgumentParser, made: argparse.ArgumentParser) -> None:
    """Adds `--help FIELD` to `jaxops config`, and the arguments of `jaxops examples`."""
    text = "show this, or what FIELD means: optimizer.lr, tables.item.dim, checkpoint"
    config.add_argument("-h", "--help", nargs="?", metavar="FIELD", action=FieldHelp, help=text)
    made.add_argument("name", nargs="?", metavar="NAME", help="print this one")
