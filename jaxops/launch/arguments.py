"""The arguments of `jaxops launch` as values; jaxops/launch/request.py checks them."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `jaxops launch`, as they are given; see the command's help for each."""

    config: str
    overrides: Sequence[str]
    on: str
    backend: str
    hosts: str | None = None
    workers: int | None = None
    max_hours: float | None = None
    grace: float = 120.0
    retries: int = 10
    python: str | None = None
    lock: str = "requirements.lock"
    wheelhouse: str | None = None
    coordinator: str | None = None
    secrets: Sequence[str] = ()
    accept_code: bool = False
    options: Sequence[str] = ()
    spot: bool = False
    flex: bool = False
    reservation: str | None = None
    detach: bool = False

    @property
    def price(self) -> str:
        """The price class that is asked for."""
        asked = {"spot": self.spot, "flex": self.flex, "reservation": self.reservation is not None}
        return next((name for name, wanted in asked.items() if wanted), "on demand")

    def option(self, key: str, default: str = "") -> str:
        """Returns the value of `--option KEY=VALUE`; the last one counts."""
        return {**dict(one.split("=", 1) for one in self.options)}.get(key, default)
