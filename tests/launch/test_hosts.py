"""The seam to machines: every argument arrives as it was, and a host that does not answer is named."""

import os
import stat

import pytest

from jaxops.core.failures import RunFailed, UserError
from jaxops.launch.hosts import LocalHost, SshHost, Unreachable, at_port, each, parse_hosts

ODD = ["a b", "$HOME", "it's", "`id`", "", "-x", 'say "hi"', "semi;colon", "*", "new\nline", "ünï"]


@pytest.fixture
def fake_ssh(tmp_path, monkeypatch):
    """An `ssh` that hands the command to a shell, as sshd does; a host called `away` does not answer."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != -- ]; do shift; done\n'
        '[ "$2" = away ] && { echo "ssh: connect to host away: refused" >&2; exit 255; }\n'
        'shift 2; exec sh -c "$*"\n'
    )
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("host", [LocalHost("here"), SshHost("alpha")])
def test_arguments_and_stdin_arrive_as_they_were(fake_ssh, host):
    done = host.run(["printf", "[%s]", *ODD])
    assert (done.code, done.out) == (0, "".join(f"[{word}]" for word in ODD))
    assert host.run(["cat"], stdin=b"bytes").out == "bytes"
    failed = host.run(["sh", "-c", "echo why >&2; exit 3"])
    assert (failed.code, failed.last_words) == (3, "why")


def test_a_host_that_does_not_answer_is_named_with_what_to_try(fake_ssh):
    with pytest.raises(Unreachable, match=r"away: ssh failed: .*refused .*try: ssh away true"):
        SshHost("away").run(["true"])
    with pytest.raises(Unreachable, match=r"alpha: no answer within 0 s to: ssh .*sleep 5"):
        SshHost("alpha").run(["sleep", "5"], timeout=0.2)


def test_all_hosts_that_fail_are_named_at_once(fake_ssh):
    hosts = [SshHost("alpha"), SshHost("away"), LocalHost("here")]

    def call(worker, host):
        if worker == 2:
            raise RunFailed("here: no room")
        return host.run(["true"]).code

    with pytest.raises(Unreachable, match=r"(?s)away: ssh failed.*here: no room"):
        each(call, hosts)
    assert each(lambda worker, host: (worker, host.name), hosts) == [(0, "alpha"), (1, "away"), (2, "here")]


def test_hosts_are_read_from_words_or_a_file(tmp_path):
    assert parse_hosts("alpha, me@beta.example") == ["alpha", "me@beta.example"]
    (tmp_path / "hosts").write_text("alpha  # the first\n\n# none\nbeta\n")
    assert parse_hosts(f"@{tmp_path / 'hosts'}") == ["alpha", "beta"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "no host in it"),
        ("@/no/such/file", "cannot read the list of hosts"),
        ("alpha,alpha", "alpha is there twice"),
        ("-oProxyCommand=id", "no name of a host"),
        ("alpha;id", "no name of a host"),
        ("a b", "no name of a host"),
    ],
)
def test_what_is_no_host_is_refused(given, says):
    with pytest.raises(UserError, match=says):
        parse_hosts(given)


def test_an_address_of_version_six_stands_in_brackets_before_a_port():
    assert parse_hosts("::1,me@2001:db8::7,fe80::1%eth0") == ["::1", "me@2001:db8::7", "fe80::1%eth0"]
    assert at_port("::1", 80) == at_port("[::1]", 80) == "[::1]:80"
    assert at_port("alpha", 80) == "alpha:80"
