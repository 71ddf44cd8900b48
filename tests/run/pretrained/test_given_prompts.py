"""Prompts that a user gives to `sample`."""

from jaxops.run.pretrained.given_prompts import prompt_rows


def test_lines_of_prompts_end_at_newlines_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\u2028still\x0cone\r\n\ntwo\n".encode())
    found = prompt_rows(tmp_path / "a.txt")
    assert [(where[-1], row["prompt"]) for where, row in found] == [("1", "one\u2028still\x0cone"), ("3", "two")]
