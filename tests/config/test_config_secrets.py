"""A secret is read when code of one's own is called, and stands nowhere that a run writes or says."""

import json
import os
import sys
from pathlib import Path

import pytest
from tiny_runs import folder, no_report  # noqa: F401 (fixtures)

from jaxops.cli.main import _without_secrets, main
from jaxops.config.bypath import ByPath
from jaxops.config.secrets import Secret, looks_like_credential, secrets_in
from jaxops.core import secret_text
from jaxops.core.failures import UserError
from jaxops.core.secret_text import printable, without_passwords, without_secrets
from jaxops.run.build import load_config

VALUE = "q7-verysecret-x9"
JUDGE = """\
import jaxops as jx
from ownpkg.losses import focal

seen = []

def judged(model, key, more=None):
    seen.append((key, more))
    return focal(model)

def angry(model, key):
    raise jx.UserError(f"no access with {key}")

class Failing:
    def __init__(self, key): self.key = key
    def write(self, step, values): raise RuntimeError(f"no access with {self.key}")
"""


@pytest.fixture
def judge(folder, no_report, monkeypatch):  # noqa: F811
    monkeypatch.setattr(secret_text, "_known", {})
    monkeypatch.setenv("JUDGE_API_KEY", VALUE)
    Path("ownpkg/judge.py").write_text(JUDGE)
    return folder


def train(name: str, *more: str) -> int:
    fn = f"objective={{fn: 'ownpkg.judge:{name}', key: '${{secret:JUDGE_API_KEY}}'}}"
    return main(["train", "my.yaml", fn, "run.steps=2", "evaluate.baselines=false", *more])


def test_it_is_handed_over_and_stands_nowhere(judge, capsys, monkeypatch):
    monkeypatch.undo()  # the report too
    monkeypatch.chdir(judge)
    monkeypatch.setenv("JUDGE_API_KEY", VALUE)
    assert train("judged", "objective.more=[1, '${secret:JUDGE_API_KEY}']", "run.loggers=[tensorboard]") == 0
    assert sys.modules["ownpkg.judge"].seen == [(VALUE, [1, VALUE])]
    assert "${secret:JUDGE_API_KEY}" in Path("runs/tiny/config.yaml").read_text()
    files = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if VALUE.encode() in path.read_bytes()]
    assert main(["config", "runs/tiny/config.yaml", "--json"]) == 0
    out = capsys.readouterr()
    assert VALUE not in out.out + out.err and "${secret:JUDGE_API_KEY}" in out.out
    assert Path("runs/tiny").stat().st_mode & 0o077 == 0
    assert main(["train", "my.yaml", "run.name=open", "run.steps=2"]) == 0
    assert Path("runs/open").stat().st_mode & 0o005 == 0o005 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_message_of_ones_own_code_is_shown_without_it(judge, capsys):
    assert train("angry") == 2
    assert "no access with ${secret:JUDGE_API_KEY}" in capsys.readouterr().err


def test_a_failure_is_recorded_and_traced_without_it(judge, capsys):
    logger = "run.loggers=[{fn: 'ownpkg.judge:Failing', key: '${secret:JUDGE_API_KEY}'}]"
    with pytest.raises(RuntimeError, match=VALUE) as failure:
        main(["train", "my.yaml", logger, "run.steps=2", "run.log_every=1"])
    assert "no access with ${secret:JUDGE_API_KEY}" in json.loads(Path("runs/tiny/summary.json").read_text())["reason"]
    assert not [p for p in Path("runs").rglob("*") if p.is_file() and VALUE.encode() in p.read_bytes()]
    capsys.readouterr()
    _without_secrets(sys.__excepthook__)(failure.type, failure.value, failure.tb)
    said = capsys.readouterr().err
    assert VALUE not in said and "RuntimeError: no access with ${secret:JUDGE_API_KEY}" in said


def test_one_that_is_not_set_is_told_at_once(judge, capsys, monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY")
    monkeypatch.setenv("JUDGE_APIKEY", "x")
    assert train("judged") == 2
    said = capsys.readouterr().err
    assert "the secret JUDGE_API_KEY is not set" in said and "did you mean 'JUDGE_APIKEY'" in said
    assert not Path("runs").exists()


@pytest.mark.parametrize("where", ["data.path", "run.dir", "evaluate.metrics", "run.steps"])
def test_it_goes_to_code_of_ones_own_alone(judge, capsys, where):
    assert main(["train", "my.yaml", f"{where}=" + "${secret:JUDGE_API_KEY}"]) == 2
    said = capsys.readouterr().err
    assert VALUE not in said and where in said


@pytest.mark.parametrize("text", ["${secret:JUDGE_API_KEY}!", "${secret:JUDGE_API_KEY:none}", "${secret}"])
def test_it_stands_alone(judge, text):
    with pytest.raises(UserError, match="stands alone"):
        load_config("my.yaml", [f"objective={{fn: 'ownpkg.judge:judged', key: '{text}'}}"])


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "WANDB_API_KEY", "GITHUB_PAT"])
def test_env_refuses_what_is_called_like_a_credential(judge, monkeypatch, name):
    monkeypatch.setenv(name, VALUE)
    with pytest.raises(UserError, match=rf"\$\{{secret:{name}\}}") as error:
        load_config("my.yaml", [f"run.dir=${{env:{name}}}"])
    assert VALUE not in str(error.value)


@pytest.mark.parametrize(
    "name", ["BUCKET", "PWD", "MAX_TOKENS", "TOKENIZER", "STEPS", "KEYBOARD", "PATH_TO_DATA", "RUN"]
)
def test_other_names_are_none(name):
    assert not looks_like_credential(name)


def test_a_password_in_a_url_is_neither_recorded_nor_shown(judge, capsys, monkeypatch):
    monkeypatch.setenv("BUCKET_URL", "s3://me:hunter2-pw@bucket/x")
    for value in ("${env:BUCKET_URL}", "s3://me:hunter2-pw@bucket/x"):
        assert main(["train", "my.yaml", f"run.dir={value}"]) == 2
        said = capsys.readouterr().err
        assert "hunter2" not in said and "secret:" in said
    assert main(["evaluate", "s3://me:hunter2-pw@bucket/x"]) == 2
    assert "hunter2" not in capsys.readouterr().err


def test_a_reference_compares_and_prints_as_what_it_is():
    secret = Secret("A")
    assert str(secret) == repr(secret) == f"{secret}" == "${secret:A}"
    assert list(secrets_in({"a": [secret, "${secret:B}", {"c": "${secret:C}x"}]})) == ["A", "B"]
    assert "hunter2" not in repr(ByPath("a:b", {"key": secret}))


def test_text_is_shown_without_secrets_and_escapes(monkeypatch):
    monkeypatch.setattr(secret_text, "_known", {})
    secret_text.remember_secret("abcd", "${secret:A}")
    secret_text.remember_secret("abcdefgh", "${secret:B}")
    secret_text.remember_secret("x", "${secret:C}")
    assert without_secrets("abcdefgh abcd x") == "${secret:B} ${secret:A} x"
    assert without_passwords("http://u:p@h:1/x and s3://b/k@v") == "http://***@h:1/x and s3://b/k@v"
    assert printable("a\x1b[31mb\x1b]0;title\x07c\x1b]8;;u\x1b\\d\re\u202ef\tg\n") == "abcdef\tg\n"


def test_the_password_of_an_endpoint_is_never_printed(monkeypatch):
    from jaxops.core.stores import StoreError, advice, parse_url

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2-pw@localhost:9")
    said = advice(parse_url("s3://bucket/x"), StoreError("error sending request for http://me:hunter2-pw@localhost:9/"))
    assert "hunter2" not in said and "http://***@localhost:9 does not answer" in said
