"""A config that was made to do harm, or is only odd, is one message and costs nothing."""

import time
from pathlib import Path

import pytest

from jaxops.cli.main import main
from jaxops.config.node import plain_node
from jaxops.config.yaml_text import MAX_BYTES, parse_yaml, scalar_of
from jaxops.core.failures import UserError
from jaxops.run.build import load_config


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9), "more than 100,000 values"),
        ("a: " + "[" * 5000, "nested more than 100 deep"),
        ("a: " + "{b: " * 5000, "nested more than 100 deep"),
        ("\n".join(" " * n + "a:" for n in range(300)), "nested more than 100 deep"),
        ("a: x\0y", "not YAML"),
        ('a: "x\\0y"', "a character that no configuration needs"),
        ('"x\\0y": 1', "a key with a character"),
        ('a: "\\ud800"', "a character that no configuration needs|not YAML"),
        ("a: " + "x" * MAX_BYTES, "too long for a configuration"),
        ("a: 1" + "0" * 6000, "not what its tag says"),
        ("&a [*a]", "inside the very thing"),
    ],
)
def test_it_is_one_message_and_quick(text, message):
    began = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        parse_yaml(text, "my.yaml")
    assert str(error.value).startswith("my.yaml") or "my.yaml" in str(error.value)
    assert len(str(error.value)) < 7000 and time.monotonic() - began < 20


def test_what_people_write_is_read():
    text = bomb(3) + '\nb: [[[[[[[[1]]]]]]]]\nsep: "\\x01"\nquote: "\\t"\n'
    found = plain_node(parse_yaml(text, "my.yaml"))
    assert len(found["a2"]) == 10 and found["sep"] == "\x01" and found["quote"] == "\t"


def test_a_number_of_too_many_digits_stays_text():
    assert scalar_of("9" * 6000) == "9" * 6000


@pytest.mark.parametrize(
    "text", ["base: ~nobody-here/x", "base: " + "x" * 300, "base: [" + "y/" * 3000 + "x]", 'base: "a\\0b"']
)
def test_a_base_that_no_file_can_be(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(text + "\n")
    with pytest.raises(UserError, match=r"my\.yaml"):
        load_config("my.yaml")


@pytest.mark.parametrize("name", ["x" * 256, "~nobody-here/x", "x/" * 3000, "/dev/zero", "/dev/null"])
@pytest.mark.parametrize("command", ["train", "config", "evaluate"])
def test_a_name_that_no_file_can_have(tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    assert main([command, name]) == 2
    assert capsys.readouterr().err.startswith("jaxops: ")


@pytest.mark.parametrize("command", [["config", "--diff"], ["compare"], ["runs"], ["ckpt", "list"]])
def test_nor_a_folder(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main([*command, *["x" * 256] * (2 if command[-1] in ("--diff", "compare") else 1)]) == 2


def test_a_run_whose_name_is_longer_than_files_may_be(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "rec/movielens_sasrec", "run.name=" + "x" * 256]) == 2
    assert "run.name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 256, "a/" * 3000 + "b"])
def test_nor_a_folder_of_runs(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("user,item,time\n" + "".join(f"u{n % 9},i{n % 7},{n}\n" for n in range(90)))
    data = "data={kind: interactions, path: p.csv}"
    assert main(["train", "rec/sasrec", data, "run.steps=1", f"run.dir={name}"]) == 2
    assert "Traceback" not in capsys.readouterr().err
