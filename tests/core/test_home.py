"""Paths that begin with `~`."""

import pytest

from jaxops.core import cache
from jaxops.core.failures import UserError
from jaxops.core.home import expand_home


def test_home_folders_are_expanded_and_nothing_else(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("~/runs/x") == "/home/me/runs/x" and expand_home("~") == "/home/me"
    assert expand_home("~root/x").endswith("/x") and "~" not in expand_home("~root/x")
    for path in ("runs/x", "./~nobody-here/x", "/a/~/b", "s3://bucket/~/x", ""):
        assert expand_home(path) == path


def test_a_home_folder_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"^run.dir: ~nobody-here/x: there is no home folder ~nobody-here; if"):
        expand_home("~nobody-here/x", "run.dir")
    for variable, root in (("JAXOPS_CACHE", cache.cache_root), ("JAXOPS_STATE", cache.state_root)):
        monkeypatch.setenv(variable, "~nobody-here")
        with pytest.raises(UserError, match=f"^{variable}: ~nobody-here: there is no home folder"):
            root()
