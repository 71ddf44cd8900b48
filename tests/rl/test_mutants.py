"""Every planted error of mutants.py is found by a test that it names, and docs/rlhf.md has the table of all."""

import pathlib
import subprocess
import sys

import mutants
import pytest


@pytest.mark.parametrize("error", mutants.MUTANTS, ids=lambda error: error.name)
def test_an_error_is_still_a_change_of_one_place_of_the_source(error):
    function = mutants.function_of(error.where)
    code = function.__code__
    with mutants.planted(error):
        assert function.__code__.co_code != code.co_code or function.__code__.co_consts != code.co_consts
    assert function.__code__ is code


def test_the_docs_list_all_errors():
    rows = mutants.DOC.read_text().split(mutants.BEGIN)[1].split(mutants.END)[0].strip().splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [error.name for error in mutants.MUTANTS]
    assert len({error.name for error in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 40


@pytest.mark.slow
def test_every_error_is_found_and_without_any_all_tests_pass():
    command = [sys.executable, str(pathlib.Path(mutants.__file__))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    count = len(mutants.MUTANTS)
    assert f"{count} of {count} planted errors are found" in found.stdout
