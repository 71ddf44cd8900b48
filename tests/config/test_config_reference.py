"""What is said of every field comes out of the dataclasses themselves."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

import pytest

from jaxops.cli.help import field_help
from jaxops.cli.main import main
from jaxops.config.reference import find_fields, find_sections, sections, values_at
from jaxops.core.failures import UserError
from jaxops.run.family import family_of, shipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """A small one.

    Attributes:
      width: how wide it is,
        in metres.
    """

    width: int
    kind: Literal["small"] = "small"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Large(Small):
    """A large one.

    Attributes:
      height: how high it is.
    """

    height: float = 2.5
    kind: Literal["large"] = "large"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shelf:
    """All of it."""

    box: Small | Large = Small(width=3)
    by_name: Mapping[str, Small | None] = dataclasses.field(default_factory=dict)
    again: "Shelf | None" = None


def test_each_kind_is_a_section_with_what_it_inherits():
    found = list(sections(Shelf))
    assert [(section.path, section.kind) for section in found] == [
        ("", ""),
        ("box", "small"),
        ("box", "large"),
        ("by_name.*", "small"),
    ]
    (large,) = [section for section in found if section.kind == "large"]
    assert large.text == "A large one." and large.source.endswith(":Large")
    said = {field.path: (field.expected, field.default, field.text) for field in large.fields}
    assert said["box.width"] == ("an integer", "", "how wide it is, in metres.")
    assert said["box.height"] == ("a number", "2.5", "how high it is.")


def test_the_default_of_a_section_is_that_of_the_field_around_it():
    (small, *_) = find_sections(list(sections(Shelf)), "box")
    assert {field.path: field.default for field in small.fields}["box.width"] == "3"


@pytest.mark.parametrize("path", ["by_name.*.width", "by_name.left.width", "by_name.width"])
def test_what_the_user_chooses_may_stand_in_the_path(path):
    ((section, field),) = find_fields(list(sections(Shelf)), path)
    assert (section.path, field.path) == ("by_name.*", "by_name.*.width")


def test_values_of_a_tree():
    tree = {"a": {"x": {"b": 1}, "y": {"c": 2}}, "l": [{"b": 3}, {"b": 4}]}
    assert list(values_at(tree, "a.*.b")) == [1] and list(values_at(tree, "l.*.b")) == [3, 4]
    assert list(values_at(tree, "a.x.b")) == [1] and list(values_at(tree, "nothing")) == []


@pytest.mark.parametrize("task", shipped())
def test_every_shipped_field_has_a_type_and_its_section_says_something(task):
    found = list(sections(family_of(task).config))
    assert len(found) > 40
    assert [section.source for section in found if not section.text] == []
    assert all(field.expected for section in found for field in section.fields)


def test_help_of_a_field_says_type_default_meaning_and_where(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["config", "--help", "optimizer.lr"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "a number; default 0.001   [adamw, adafactor, lion, sgd, muon; task language, policy, rec, reward]" in out
    assert "the learning rate after warm-up" in out and " in language/" in out


def test_help_of_a_section_lists_its_fields():
    text = "\n".join(field_help("checkpoint"))
    assert "The times of saves" in text and "    keep: an integer; default 3" in text
    assert text.count("a section") == 1  # it is the same in every family


def test_an_unknown_field_gets_the_nearest_one(capsys):
    assert main(["config", "--help", "optimizer.lrr"]) == 2
    assert capsys.readouterr().err == "jaxops: no field 'optimizer.lrr'; did you mean 'optimizer.lr'?\n"
    with pytest.raises(UserError, match="no field 'zzzzzz'; `jaxops config CONFIG` lists those of a config"):
        field_help("zzzzzz")


@pytest.mark.parametrize(
    ("asked", "offered"),
    [("lr", "'optimizer.lr' or 'tables.*.optimizer.lr'"), ("run.lr", "'optimizer.lr' or"), ("seed", "'run.seed'")],
)
def test_a_name_without_its_section_gets_the_whole_path(asked, offered):
    with pytest.raises(UserError, match=re.escape(f"no field '{asked}'; did you mean {offered}")):
        field_help(asked)


def test_fields_of_sweeps_and_loops_are_known():
    assert "an integer; default 30   [tpe or gp or random; a sweep's file]" in "\n".join(field_help("search.trials"))
    assert "kind: slurm   [a sweep's file]" in "\n".join(field_help("runner"))
    assert "an integer; default 200   [task rlhf]" in "\n".join(field_help("pairs.per_round"))


def test_without_a_field_it_is_the_help_of_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["config", "-h"])
    assert "usage: jaxops config" in capsys.readouterr().out


def test_examples_are_listed_and_printed(capsys):
    assert main(["examples"]) == 0
    assert "focal_loss " in capsys.readouterr().out
    assert main(["examples", "focal_loss"]) == 0
    program = capsys.readouterr().out
    compile(program, "focal_loss.py", "exec")
    assert "def focal(model" in program
    assert main(["examples", "focal_los"]) == 2
    assert "did you mean 'focal_loss'?" in capsys.readouterr().err
