"""What README and docs print is right: commands are understood, YAML fits the schemas, Python compiles.

The pages that a newcomer follows word by word are run from their first line to their last in test_quickstart.py and
tests/cli/test_readme.py.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocks import Block, blocks, commands

from jaxops.cli.main import parse_arguments
from jaxops.config.errors import ConfigError
from jaxops.config.load import from_dict, load
from jaxops.config.node import plain_node
from jaxops.config.yaml_text import parse_yaml
from jaxops.core.failures import UserError
from jaxops.flow.rlhf.config import RlhfConfig
from jaxops.run.build import load_config
from jaxops.run.family import SCHEMAS
from jaxops.sweep.spec import SweepSpec

SHELL = [(block, words) for block in blocks("bash") for words in commands(block)]
OF_JAXOPS = [pytest.param(words[1:], id=f"{block} {' '.join(words)}") for block, words in SHELL if words[0] == "jaxops"]
BASES = (
    "rec/movielens_sasrec",
    "rec/movielens_two_tower",
    "rec/ctr_dcnv2",
    "language/sft_tiny",
    "language/dpo_tiny",
    "reward/ratings_tiny",
    "policy/grpo_arithmetic",
    "policy/ppo_sentiment",
)
"""What a part of a config is put over: it must fit one of them."""
WIDEST_LINE = 98
"""The letters of a line of code that fit between the side bars of the documentation."""


def test_there_are_many():
    assert len(SHELL) > 50 and len(blocks("yaml")) > 20 and len(blocks("python")) > 15


def test_every_shell_block_begins_with_something_known():
    known = {"jaxops", "make", "python", "seq", "pip", "git", "export", "JAX_PLATFORMS=cpu"}
    assert {words[0] for _, words in SHELL} - known == set()


@pytest.mark.parametrize("words", OF_JAXOPS)
def test_each_command_is_understood(words):
    if "|" in words or "..." in words:
        pytest.skip("a summary of several commands")
    if words[:2] == ["config", "--help"]:
        from jaxops.cli.help import field_help

        assert field_help(words[2])
        return
    args = parse_arguments(words)
    config = getattr(args, "config", None)
    if config and re.match(r"(rec|language|reward|policy|sweep)/", config) and args.command not in ("sweep", "rlhf"):
        assert load_config(config, [one for one in args.overrides if "FOLDER" not in one])


def problems_of(tree: Mapping[str, Any], where: str, folder: Path) -> list[str]:
    """Returns what is wrong with a config, or with a part of one that is put over a whole one.

    What a part leaves out is not wrong, and code by import path is not looked for.
    """
    schemas: Any = SCHEMAS
    if "rounds" in tree:
        schemas, bases = RlhfConfig, [{}]
    elif tree.keys() & {"runs", "search", "runner", "set"}:
        schemas, bases = SweepSpec, [{}]
        tree = {name: value for name, value in tree.items() if name != "base"}
    elif "base" in tree or "task" in tree:
        path = folder / "block.yaml"
        path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))
        return _wrong(lambda: load(SCHEMAS, str(path), by="task", check_imports=False))
    else:
        bases = [load_config(base).resolved for base in BASES]
    found = [
        _wrong(lambda base=base: from_dict(schemas, {**base, **tree}, source=where, check_imports=False))
        for base in bases
    ]
    return min(found, key=len)


def _wrong(read: Callable[[], Any]) -> list[str]:
    try:
        read()
    except ConfigError as error:
        told = [str(one) for one in error.problems]
        return [one for one in told if "missing; expected" not in one and "say how long" not in one]
    except UserError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_fits_a_schema(block: Block, tmp_path, monkeypatch):
    for name in re.findall(r"\$\{(?:env|secret):(\w+)", block.text):
        monkeypatch.setenv(name, "something-that-no-message-says")
    for text in re.split(r"^---$", block.text, flags=re.M):
        tree = plain_node(parse_yaml(text, str(block)))
        assert isinstance(tree, Mapping) and problems_of(tree, str(block), tmp_path) == []


def test_no_line_is_folded_in_the_browser():
    """docs/_static/jaxops.css makes code so small that these fit; README is read elsewhere."""
    of_docs = [
        block for block in blocks("bash", "yaml", "python") if block.page not in ("README.md", "CONTRIBUTING.md")
    ]
    wide = [f"{block}: {line}" for block in of_docs for line in block.text.splitlines() if len(line) > WIDEST_LINE]
    assert wide == []


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles(block: Block):
    compile(block.text, str(block), "exec")
