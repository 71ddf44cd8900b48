"""The version of jaxops, which stands in pyproject.toml too: a checkout that is not installed has no metadata."""

VERSION = "0.1.0"
